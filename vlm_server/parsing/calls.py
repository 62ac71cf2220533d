"""Function calls in a text, handed out while they are written: the parts that all formats share.

A format is a generator over a `CallReader`. What looks like a call and is none becomes content, character by character as it was
written. Once a call's name is known and its arguments begin, the call is handed out; then its arguments are the model's own text up to
where their brackets balance, or up to the first character that no JSON has there. White space between content and a call belongs to the
format and is dropped. Knows nothing of reasoning or of HTTP.
"""

import json
from collections.abc import Callable, Collection

from vlm_server.parsing.events import ArgumentPiece, CallBegun, CallEnded, Content, Event, merged
from vlm_server.parsing.scanner import Reading, Scanner, Steps

_ARGUMENT_KEYS = ("arguments", "parameters")
_PAIRS = {"}": "{", "]": "["}
_MAX_WORD = 256  # characters of a name or a key; longer ones are no call

ReadCalls = Callable[["CallReader"], Steps[None]]


class NotACall(Exception):
    """The text is not what the format has at this place."""


class CallReader(Scanner):
    """The events of a growing text. A call counts only if it names one of `names`.

    `read` is the format: it reads to the end of the text.
    """

    def __init__(self, read: ReadCalls, names: Collection[str]) -> None:
        super().__init__()
        self._names = frozenset(names)
        self._events: list[Event] = []
        self._num_fed = 0  # characters
        self._num_before = 0  # characters of the answer before what is fed, which is all of one piece
        self._space: list[Event] = []  # at the end of the content so far: the format's if a call follows
        self._follows_call = False
        self._raw: list[str] = []  # accepted in this attempt and not handed out
        self._is_open = False
        self._num_calls = 0
        self._owed: tuple[str, ...] = ()  # ends of a call that was handed out, and behind which other text came first
        self._reading = Reading(self, read(self))

    def feed(self, text: str, place: int | None = None) -> list[Event]:
        """place: characters of the answer before the text; None: those that were fed."""
        if place is not None:
            self._num_before = place - self._num_fed
        self._num_fed += len(text)
        self._reading.feed(text)
        return self._given()

    def finish(self) -> list[Event]:
        """What was held back. A call that was handed out and not ended is ended here, as incomplete."""
        self._reading.finish()
        self._events += self._space
        return self._given()

    # --- for formats --------------------------------------------------------------------------------------------------------------

    def content_until(self, marker: str) -> Steps[bool]:
        """Hands out content up to the marker, which is accepted. False at the end of the text."""
        while True:
            found = yield from self.sees(marker, *self._owed)
            if found == marker:
                self._owed = ()
                self.accept(found)
                return True
            if found or self.is_cut_short(*self._owed):
                self._drop_end(found)
            elif not (yield from self.peek()):
                return False
            else:
                self._give_content(self.take())

    def attempt(self, calls: Steps[None], *, ends: tuple[str, ...] = ()) -> Steps[None]:
        """Reads calls; gives back as content what is none. `ends`: what may still come behind a call that was handed out."""
        num_calls = self._num_calls
        try:
            yield from calls
        except NotACall:
            has_called = self._num_calls > num_calls
            if self._is_open:
                self._end_call(is_complete=False)
            if not (has_called and self._is_ended):
                self._give_content("".join(self._raw))
            self._owed = ends if has_called else ()
        self._raw.clear()

    def accept(self, text: str) -> None:
        """Takes what was peeked at as a part of the attempt."""
        self._raw.append(self.take(len(text)))

    def expect(self, *markers: str) -> Steps[str]:
        found = yield from self.sees(*markers)
        if not found:
            if self.is_cut_short(*markers):
                self._raw.append(self.take_fed())
            raise NotACall
        self.accept(found)
        return found

    def settle(self) -> None:
        """What was accepted belongs to a call that was handed out: it is no content, whatever follows."""
        self._raw.clear()

    def skip_space(self) -> Steps[None]:
        while (char := (yield from self.peek())).isspace():
            self.accept(char)

    def word(self) -> Steps[str]:
        """A name without quotes."""
        name = ""
        while (char := (yield from self.peek())).isalnum() or (char and char in "_-"):
            self.accept(char)
            name += char
            if len(name) > _MAX_WORD:
                break
        return name

    def call(self, name: str) -> Steps[None]:
        """Arguments, handed out as they come."""
        if name not in self._names or (yield from self.peek()) != "{":
            raise NotACall
        self._begin_call(name)
        yield from self._value(lambda char: self._events.append(ArgumentPiece(char)))
        self._end_call(is_complete=True)

    def call_object(self, *, first_keys: tuple[str, ...] = ()) -> Steps[None]:
        """`{"name": …, "arguments": {…}}`, keys in any order unless `first_keys` says which may come first.

        Handed out as it comes where the name is before the arguments. Without arguments, or with null, they are {}.
        """
        num_calls = self._num_calls
        name, arguments = "", "null"
        yield from self.expect("{")
        while True:
            yield from self.skip_space()
            key = yield from self._string()
            if first_keys and key not in first_keys:
                raise NotACall
            first_keys = ()
            yield from self._colon()
            if key == "name":
                name = yield from self._string()
                if name not in self._names:
                    raise NotACall
            elif key in _ARGUMENT_KEYS and name and self._num_calls == num_calls and (yield from self.peek()) == "{":
                yield from self.call(name)
            else:
                value = yield from self._kept_value()
                arguments = value if key in _ARGUMENT_KEYS else arguments
            yield from self.skip_space()
            if (yield from self.expect(",", "}")) == "}":
                break
        if self._num_calls == num_calls:
            self._give_call(name, "{}" if arguments == "null" else arguments)
        self.settle()

    def _drop_end(self, found: str) -> None:
        """Takes an end that was owed, or what there is of one."""
        self.take(len(found)) if found else self.take_fed()
        self._owed = tuple(end for end in self._owed if end != found)

    # --- JSON ---------------------------------------------------------------------------------------------------------------------

    def _colon(self) -> Steps[None]:
        yield from self.skip_space()
        yield from self.expect(":")
        yield from self.skip_space()

    def _string(self) -> Steps[str]:
        """A short string's value."""
        if (yield from self.peek()) != '"':
            raise NotACall
        text = ""

        def keep(char: str) -> None:
            nonlocal text
            self._raw.append(char)
            text += char
            if len(text) > _MAX_WORD:
                raise NotACall

        yield from self._quoted(keep)
        try:
            return str(json.loads(text, strict=False))
        except ValueError:
            raise NotACall from None

    def _kept_value(self) -> Steps[str]:
        text: list[str] = []

        def keep(char: str) -> None:
            self._raw.append(char)
            text.append(char)

        yield from self._value(keep)
        return "".join(text)

    def _value(self, give: Callable[[str], None]) -> Steps[None]:
        """One value: a string, a literal, or as much as its brackets enclose."""
        opened: list[str] = []
        while True:
            char = yield from self.peek()
            if char == '"':
                yield from self._quoted(give)
            elif char in ("{", "["):
                opened.append(char)
                give(self.take())
            elif char in _PAIRS:
                if not opened or opened.pop() != _PAIRS[char]:
                    raise NotACall
                give(self.take())
            elif char.isalnum() or (char and char in "+-."):
                yield from self._literal(give)
            elif opened and (char.isspace() or char in (",", ":")):
                give(self.take())
            else:
                raise NotACall
            if not opened:
                return

    def _quoted(self, give: Callable[[str], None]) -> Steps[None]:
        give(self.take())
        while True:
            char = yield from self.peek()
            if not char:
                raise NotACall
            give(self.take())
            if char == '"':
                return
            if char == "\\" and (yield from self.peek()):
                give(self.take())

    def _literal(self, give: Callable[[str], None]) -> Steps[None]:
        while (char := (yield from self.peek())).isalnum() or (char and char in "+-._"):
            give(self.take())

    # --- events -------------------------------------------------------------------------------------------------------------------

    def _give_content(self, text: str) -> None:
        """Of text that ends where the reader is."""
        end = self._num_before + self.num_taken
        if self._follows_call:
            text = text.lstrip()
        if not text:
            return
        self._follows_call = False
        shown = text.rstrip()
        if shown:
            self._events += [*self._space, Content(shown, end - len(text))]
            self._space = []
        if len(shown) < len(text):
            self._space.append(Content(text[len(shown) :], end - len(text) + len(shown)))

    def _give_call(self, name: str, arguments: str) -> None:
        if name not in self._names or not arguments.startswith("{"):
            raise NotACall
        self._begin_call(name)
        self._events.append(ArgumentPiece(arguments))
        self._end_call(is_complete=True)

    def _begin_call(self, name: str) -> None:
        self._raw.clear()
        self._space = []
        self._is_open = True
        self._num_calls += 1
        self._events.append(CallBegun(name))

    def _end_call(self, *, is_complete: bool) -> None:
        self._is_open = False
        self._follows_call = True
        self._events.append(CallEnded(is_complete))

    def _given(self) -> list[Event]:
        events, self._events = merged(self._events), []
        return events
