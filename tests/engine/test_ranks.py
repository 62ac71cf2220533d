"""What rank 0 makes of others that died, without a model."""

import socket
from types import SimpleNamespace

import pytest

import engine.workers
from engine.channel import Channel
from engine.config import EngineConfig
from engine.messages import StartRank, ToRank
from engine.request import Plan
from engine.workers import RankDeadError, Ranks

CONFIG = EngineConfig(model_folder="/nowhere")


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    monkeypatch.setattr(engine.workers, "ModelRunner", lambda *args, **kwargs: None)
    monkeypatch.setattr(engine.workers, "check_devices", lambda config: None)
    monkeypatch.setattr(engine.workers, "set_threads", lambda config: None)
    return Ranks(CONFIG, on_progress=lambda fraction: None)


def test_a_rank_that_died_before_a_plan_is_not_taken_for_the_servers_end(ranks: Ranks) -> None:
    """Regression: its EOFError ended the engine with status 0 and without a line in the log."""
    ours, theirs = socket.socketpair()
    theirs.close()
    ranks._channels.append(Channel(ours, ToRank))

    with pytest.raises(RankDeadError, match="rank 1"):
        ranks.execute(Plan(chunks=()), {})

    ranks.close()


def test_a_rank_that_dies_as_it_starts_is_named_and_collected(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(engine.workers.subprocess, "Popen", lambda *args, **kwargs: SimpleNamespace(wait=waited.append))

    with pytest.raises(RankDeadError, match="rank 1"):
        ranks._spawn(StartRank(CONFIG, 1, "/nowhere"))
    ranks.close()

    assert len(waited) == 1
