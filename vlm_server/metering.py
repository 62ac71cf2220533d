"""Whose quota the work of this moment is charged to, wherever in the server it is done.

The middleware opens a meter for a request, and all that the request starts (tasks too) finds it: a route cannot forget to count. Tokens are
charged when the engine gets a prompt and with each step of an answer, pictures when they are loaded. Knows nothing of HTTP.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from engine.request import EngineError, Prompt
from vlm_server.quotas import PIXELS, TOKENS, Quota


@dataclass(slots=True)
class _Charge:
    """A prompt that the engine has for one or several answers."""

    num_running: int = 0
    has_output: bool = False
    is_refused: bool = False


class Meter:
    """One request's use, charged to its key's quota."""

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self._admitted: set[str] = set()
        self._charges: dict[int, _Charge] = {}  # by the prompt's id; the answers that run hold the prompt

    def admit(self, *kinds: str) -> None:
        """Raises QuotaExceededError. What is admitted once goes on, whatever it takes."""
        asked = [kind for kind in kinds if kind not in self._admitted]
        self._quota.admit(*asked)
        self._admitted.update(asked)

    def charge_pixels(self, num_pixels: int) -> None:
        self._quota.take(PIXELS, num_pixels)

    @contextmanager
    def answer(self, prompt: Prompt) -> Iterator["AnswerMeter"]:
        """While one answer is generated. The prompt is charged once for all its answers, and given back where the engine refuses it."""
        self.admit(TOKENS)
        charge = self._charges.setdefault(id(prompt), _Charge())
        if not charge.num_running:
            self._quota.take(TOKENS, len(prompt.token_ids))
        charge.num_running += 1
        try:
            yield AnswerMeter(self._quota, charge)
        except EngineError:
            charge.is_refused = True
            raise
        finally:
            charge.num_running -= 1
            if not charge.num_running:
                self._end(prompt, charge)

    def _end(self, prompt: Prompt, charge: _Charge) -> None:
        del self._charges[id(prompt)]
        if charge.is_refused and not charge.has_output:
            self._quota.give_back(TOKENS, len(prompt.token_ids))


class AnswerMeter:
    """One answer's tokens."""

    def __init__(self, quota: Quota, charge: _Charge) -> None:
        self._quota = quota
        self._charge = charge

    def charge_step(self, num_tokens: int) -> None:
        self._charge.has_output = True
        self._quota.take(TOKENS, num_tokens)


_METER: ContextVar[Meter | None] = ContextVar("meter", default=None)


@contextmanager
def metered(quota: Quota) -> Iterator[None]:
    """What is done within, and what that starts, is charged to `quota`."""
    token = _METER.set(Meter(quota))
    try:
        yield
    finally:
        _METER.reset(token)


def current_meter() -> Meter | None:
    """None: nothing limits this work."""
    return _METER.get()


def admit_pictures() -> None:
    """Before pictures are loaded, so that no work is done for an answer that its tokens will not allow. Raises QuotaExceededError."""
    if meter := current_meter():
        meter.admit(TOKENS, PIXELS)


def charge_pixels(num_pixels: int) -> None:
    if meter := current_meter():
        meter.charge_pixels(num_pixels)
