"""The engine process: messages in, steps, outputs back. One thread owns the engine; it ends when the server is gone.

Started by `EngineClient` with two inherited sockets, for messages to the engine and from it.
"""

import logging
import signal
import socket
import sys
from dataclasses import replace
from weakref import WeakValueDictionary

from engine.channel import Channel
from engine.core import Engine
from engine.garbage import spare_loaded_objects
from engine.log_lines import set_up_logging
from engine.messages import (
    Abort,
    Add,
    Announce,
    FromEngine,
    GetStats,
    Loading,
    Outputs,
    Ready,
    Rejected,
    SetVocabulary,
    Start,
    StartFailed,
    Stats,
    ToEngine,
    Withdraw,
)
from engine.request import EngineError, ImageInput, Prompt, PromptTooLongError, QueueFullError

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 5.0
PROGRESS_STEP = 0.05


class EngineLoop:
    """Reads messages between steps and sends each step's outputs as one message."""

    def __init__(self, engine: Engine, inbox: Channel, outbox: Channel) -> None:
        self.engine = engine
        self.inbox = inbox
        self.outbox = outbox
        self._images: WeakValueDictionary[bytes, ImageInput] = WeakValueDictionary()  # that are open, once each however many bring them

    def run(self) -> None:
        """Until the server closes its end (EOFError). Raises RankDeadError."""
        while True:
            self._read()
            self.engine.check()
            if self.engine.has_work:
                outputs = self.engine.step()
                if outputs:
                    self.outbox.send(Outputs(outputs))
                self.engine.check()  # not only after the next message

    def _read(self) -> None:
        """Handle all messages that are there; wait for one when there is nothing to do."""
        timeout_s = 0.0 if self.engine.has_work else IDLE_WAIT_S
        while (message := self.inbox.receive(timeout_s)) is not None:
            self._handle(message)
            timeout_s = 0.0

    def _handle(self, message: Add | Abort | Announce | Withdraw | GetStats | SetVocabulary) -> None:
        match message:
            case Add():
                self._add(message)
            case SetVocabulary(vocabulary):
                self.engine.set_vocabulary(vocabulary)
            case Abort(request_id):
                output = self.engine.abort(request_id)
                if output:
                    self.outbox.send(Outputs([output]))
            case Announce(owner, image):
                if image.is_open:
                    self.engine.announce(owner, self._images.setdefault(image.content_hash, image))
            case Withdraw(owner, request_follows):
                self.engine.withdraw(owner, request_follows=request_follows)
            case GetStats(call_id):
                self.outbox.send(Stats(call_id, self.engine.stats()))

    def _add(self, message: Add) -> None:
        try:
            self.engine.add(message.request_id, self._arrived(message.prompt), message.params)
        except EngineError as error:
            numbers = (error.num_tokens, error.session_len) if isinstance(error, PromptTooLongError) else ()
            self.outbox.send(Rejected(message.request_id, type(error).__name__, str(error), numbers))

    def _arrived(self, prompt: Prompt) -> Prompt:
        """With pictures that others brought as those have them. Raises QueueFullError where this process had no descriptors for them."""
        images = tuple(self._images.get(image.content_hash, image) for image in prompt.images)
        if not all(image.is_open for image in images):
            self.engine.drop_unwanted_encoding()  # of its other pictures, which were announced
            raise QueueFullError("the engine has no file descriptors left for more pictures; try again later")
        self._images.update({image.content_hash: image for image in images})
        return replace(prompt, images=images)


def main(inbox: Channel, outbox: Channel) -> int:
    """Until the server closes its end. The exit status."""
    start = inbox.receive(None)
    assert isinstance(start, Start)
    set_up_logging(logging.INFO, start.config.log_format)
    try:
        engine = Engine(start.config, on_progress=_Progress(outbox))
    except EOFError:  # the server ended meanwhile
        return 0
    except (ValueError, OSError, KeyError) as error:
        logger.exception("the engine cannot start")
        outbox.send(StartFailed(str(error)))
        return 1
    spare_loaded_objects()
    try:
        outbox.send(Ready(engine.info))
        EngineLoop(engine, inbox, outbox).run()
    except EOFError:
        engine.close()
    return 0


class _Progress:
    """Reports loading in steps of 5 %."""

    def __init__(self, outbox: Channel) -> None:
        self.outbox = outbox
        self.reported = 0.0

    def __call__(self, fraction: float) -> None:
        if fraction >= self.reported + PROGRESS_STEP or fraction == 1.0:
            self.reported = fraction
            self.outbox.send(Loading(fraction))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends with the server, whose running requests may finish before; so do the ranks
    to_engine, from_engine = (socket.socket(fileno=int(word)) for word in sys.argv[1:])
    sys.exit(main(Channel(to_engine, ToEngine), Channel(from_engine, FromEngine)))
