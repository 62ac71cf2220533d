"""One answer's text as events: its reasoning first, then content and calls. Knows nothing of tokens or of HTTP."""

from vlm_server.parsing.calls import CallReader
from vlm_server.parsing.events import CallEnded, Content, Event, merged
from vlm_server.parsing.reasoning import ReasoningReader


class AnswerParser:
    """Feeds the readers one behind the other; without any, the text is content.

    one_call: the answer is done after its first call.
    """

    def __init__(self, *, reasoning: ReasoningReader | None = None, calls: CallReader | None = None, one_call: bool = False) -> None:
        self._reasoning = reasoning
        self._calls = calls
        self._one_call = one_call
        self._ended_calls: list[bool] = []
        self._num_fed = 0  # characters
        self.is_done = False  # what follows is not part of the answer

    @property
    def has_calls(self) -> bool:
        """Whether there are calls, all of them complete."""
        return bool(self._ended_calls) and all(self._ended_calls)

    @property
    def counts_reasoning(self) -> bool:
        return self._reasoning is not None

    def is_reasoning_at(self, place: int) -> bool:
        """Whether the character at `place` of the text fed so far is between the markers of the reasoning."""
        reasoning = self._reasoning
        if reasoning is None or reasoning.begin is None:
            return False
        return reasoning.begin <= place and (reasoning.end is None or place < reasoning.end)

    def feed(self, text: str) -> list[Event]:
        place, self._num_fed = self._num_fed, self._num_fed + len(text)
        events = self._reasoning.feed(text) if self._reasoning is not None else [Content(text, place)] if text else []
        return self._kept([called for event in events for called in self._called(event)])

    def finish(self) -> list[Event]:
        events = self._reasoning.finish() if self._reasoning is not None else []
        called = [called for event in events for called in self._called(event)]
        return self._kept(called + (self._calls.finish() if self._calls is not None else []))

    def _called(self, event: Event) -> list[Event]:
        return self._calls.feed(event.text, event.place) if self._calls is not None and isinstance(event, Content) else [event]

    def _kept(self, events: list[Event]) -> list[Event]:
        kept: list[Event] = []
        for event in events:
            if self.is_done:
                break
            kept.append(event)
            if isinstance(event, CallEnded):
                self._ended_calls.append(event.is_complete)
                self.is_done = self._one_call
        return merged(kept)
