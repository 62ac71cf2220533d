"""What the server process and the engine process say to each other, and rank 0 to the other ranks."""

import msgspec

from engine.config import EngineConfig
from engine.request import EngineInfo, EngineStats, ImageInput, Plan, Prompt, SamplingParams, StepOutput


class Start(msgspec.Struct, tag=True):
    """The first message to an engine process."""

    config: EngineConfig


class SetVocabulary(msgspec.Struct, tag=True):
    vocabulary: str  # JSON of the tokenizers library


class Add(msgspec.Struct, tag=True):
    request_id: str
    prompt: Prompt
    params: SamplingParams


class Abort(msgspec.Struct, tag=True):
    request_id: str


class Announce(msgspec.Struct, tag=True):
    """A picture of a prompt that is being made."""

    owner: str  # stands for the prompt
    image: ImageInput


class Withdraw(msgspec.Struct, tag=True):
    """Nothing is announced for the prompt any more."""

    owner: str
    request_follows: bool  # with all of the prompt's pictures; False: nobody will ask for them


class GetStats(msgspec.Struct, tag=True):
    """Also the sign of life: answered between two steps."""

    call_id: int


class Loading(msgspec.Struct, tag=True):
    fraction: float


class Ready(msgspec.Struct, tag=True):
    info: EngineInfo


class StartFailed(msgspec.Struct, tag=True):
    """The engine cannot serve this checkpoint; starting it again would not help."""

    message: str


class Outputs(msgspec.Struct, tag=True):
    """One step's."""

    outputs: list[StepOutput]


class Rejected(msgspec.Struct, tag=True):
    """A request that was not added. `kind` names the exception."""

    request_id: str
    kind: str
    message: str
    numbers: tuple[int, ...] = ()


class Stats(msgspec.Struct, tag=True):
    call_id: int
    stats: EngineStats


class StartRank(msgspec.Struct, tag=True):
    """The first message to a tensor-parallel rank."""

    config: EngineConfig
    rank: int
    rendezvous: str


class Execute(msgspec.Struct, tag=True):
    plan: Plan


ToEngine = Start | SetVocabulary | Add | Abort | Announce | Withdraw | GetStats
FromEngine = Loading | Ready | StartFailed | Outputs | Rejected | Stats
ToRank = StartRank | Execute
