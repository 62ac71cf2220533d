"""A chat in the terminal: lines in, an answer out while it is written. An empty line sends, as in LMDeploy's client.

Knows of the server only that it answers; of the terminal only a function that reads a line and a stream to write to.
"""

from collections.abc import Callable, Generator
from contextlib import closing
from typing import Protocol, TextIO

from vlm_server.chat_client import ChatError, Message, Piece, picture_part, text_part, user_message

PROMPT = "\ndouble enter to end input >>> "
HELP = "An empty line sends. A line /image PATH_OR_URL adds a picture. Alone: end begins a new conversation, exit leaves."

_PICTURE_COMMAND = "/image"

# What would move the cursor or set a title is shown instead.
_SHOWN_CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(range(127, 160), "\u2421")


class AnsweringServer(Protocol):
    """See `vlm_server.chat_client.ChatServer`."""

    def answer(self, model: str, messages: list[Message], **sampling: float | None) -> Generator[Piece, None, None]: ...


class TerminalChat:
    """One person's conversation with one model; a turn that fails is forgotten."""

    def __init__(
        self,
        server: AnsweringServer,
        model: str,
        *,
        read_line: Callable[[str], str],
        output: TextIO,
        system: str | None = None,
        sampling: dict[str, float | None] | None = None,
    ) -> None:
        """read_line: shows its argument and gives the next line; raises EOFError at the end, as `input` does."""
        self._server = server
        self._model = model
        self._read_line = read_line
        self._output = output
        self._opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._sampling = sampling or {}
        self._is_over = False
        self.history: list[Message] = list(self._opening)

    def run(self) -> None:
        """Until exit, the end of the input, or Ctrl-C where a line is read."""
        self._say(HELP)
        try:
            while not self._is_over:
                self._turn()
        except KeyboardInterrupt:
            self._say("")

    def _turn(self) -> None:
        lines = self._read_lines()
        match [line.strip() for line in lines]:
            case ["exit"]:
                self._is_over = True
            case ["end"]:
                self.history = list(self._opening)
                self._say("(a new conversation)")
            case stripped if any(stripped):
                self._send(lines)

    def _read_lines(self) -> list[str]:
        """Up to an empty line or the end of the input."""
        lines: list[str] = []
        try:
            while line := self._read_line("" if lines else PROMPT).rstrip("\r\n"):
                lines.append(line)
        except EOFError:
            self._is_over = True
        return lines

    def _send(self, lines: list[str]) -> None:
        try:
            question = user_message(_parts(lines))
            answer = self._show_answer([*self.history, question])
        except ChatError as error:
            self._say(f"error: {error}")
            return
        if answer:
            self.history += [question, {"role": "assistant", "content": answer}]

    def _show_answer(self, messages: list[Message]) -> str:
        """Writes the answer as it comes; Ctrl-C stops it. What came of it. Raises ChatError."""
        answer = ""
        is_thinking = False
        self._say("")
        try:
            with closing(self._server.answer(self._model, messages, **self._sampling)) as pieces:
                for piece in pieces:
                    self._write("\n\n" if is_thinking and piece.text else "")
                    is_thinking = bool(piece.reasoning) or (is_thinking and not piece.text)
                    answer += piece.text
                    self._write(piece.reasoning + piece.text)
                    if piece.finish_reason == "length":
                        self._write(" (cut off: the limit of tokens is reached)")
        except KeyboardInterrupt:
            self._write(" (stopped; Ctrl-C again leaves)")
        finally:
            self._say("")
        return answer

    def _say(self, line: str) -> None:
        self._write(line + "\n")

    def _write(self, text: str) -> None:
        self._output.write(text.replace("\r\n", "\n").translate(_SHOWN_CONTROLS))
        self._output.flush()


def _parts(lines: list[str]) -> list[Message]:
    """Texts and pictures in their order. Raises ChatError for a picture that cannot be sent."""
    parts: list[Message] = []
    text: list[str] = []
    for line in lines:
        command, _, name = line.strip().partition(" ")
        if command != _PICTURE_COMMAND:
            text.append(line)
            continue
        if not name.strip():
            raise ChatError("/image needs a path or a URL: /image picture.png")
        parts += [*_text(text), picture_part(_unquoted(name.strip()))]
        text = []
    return [*parts, *_text(text)]


def _text(lines: list[str]) -> list[Message]:
    return [text_part("\n".join(lines))] if lines else []


def _unquoted(name: str) -> str:
    """Terminals put a path between quotes that is dropped on them."""
    return name[1:-1] if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"" else name
