import contextlib
import gc
import socket
import weakref
from collections.abc import Iterator

import pytest

from engine import process
from engine.channel import Channel
from engine.config import EngineConfig
from engine.garbage import spare_loaded_objects
from engine.messages import FromEngine, Ready, Start, ToEngine
from engine.request import EngineInfo

INFO = EngineInfo(
    model_type="llama",
    device="cpu",
    dtype="float32",
    tp=1,
    session_len=64,
    block_size=16,
    num_blocks=8,
    vocab_size=100,
    hidden_size=32,
    eos_token_ids=(2,),
    load_time_s=0.1,
)


class Knot:
    """Refers to itself, so that only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def all_thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_is_loaded_is_passed_over_and_what_comes_after_is_freed() -> None:
    before = weakref.ref(Knot())
    loaded = [Knot() for _ in range(1000)]

    spare_loaded_objects()
    after = weakref.ref(Knot())

    assert before() is None
    assert gc.get_freeze_count() > len(loaded)
    assert not {id(knot) for knot in loaded} & {id(each) for each in gc.get_objects()}
    gc.collect()
    assert after() is None


def test_an_engine_that_is_ready_has_spared_what_it_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class LoadedEngine:
        info = INFO
        has_work = False

        def __init__(self, *_: object, **__: object) -> None:
            self.loaded = Knot()

        def close(self) -> None:
            assert id(self.loaded) not in {id(each) for each in gc.get_objects()}

    monkeypatch.setattr(process, "Engine", LoadedEngine)
    with contextlib.ExitStack() as stack:
        ours, inbox, outbox, theirs = (stack.enter_context(each) for _ in range(2) for each in socket.socketpair())
        Channel(ours, FromEngine).send(Start(EngineConfig(model_folder="/nowhere")))
        ours.shutdown(socket.SHUT_WR)

        assert process.main(Channel(inbox, ToEngine), Channel(outbox, FromEngine)) == 0

        assert isinstance(Channel(theirs, FromEngine).receive(1.0), Ready)
    assert gc.get_freeze_count() > 0
