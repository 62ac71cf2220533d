"""From a request's fields to the engine's `SamplingParams`; what an absent field means.

An absent field takes the checkpoint's `generation_config.json`, else the plain default; with `--generation-config lmdeploy` it takes
the values that LMDeploy's routes had until 0.9. Knows nothing of HTTP.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from engine.request import InvalidRequestError, SamplingParams
from vlm_server.errors import bad_request
from vlm_server.protocol import GenerationFields

LMDEPLOY = "lmdeploy"  # a value of --generation-config, as is "auto"

_MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What a request's absent sampling fields mean."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def load(cls, source: str, folder: Path) -> "SamplingDefaults":
        """`source`: auto (the checkpoint's `generation_config.json` in `folder`), lmdeploy, or another folder that holds one."""
        if source == LMDEPLOY:
            return cls(temperature=0.7, top_k=40)
        path = (folder if source == "auto" else Path(source)) / "generation_config.json"
        if source != "auto" and not path.is_file():
            raise ValueError(f"--generation-config: {source} is neither auto nor lmdeploy nor a folder with a generation_config.json")
        return cls.from_generation_config(json.loads(path.read_bytes())) if path.is_file() else cls()

    @classmethod
    def from_generation_config(cls, values: dict[str, object]) -> "SamplingDefaults":
        """Keys as transformers writes them; `do_sample: false` means greedy."""
        defaults = cls(
            temperature=_number(values, "temperature", 1.0),
            top_p=_number(values, "top_p", 1.0),
            top_k=int(_number(values, "top_k", 0)),
            min_p=_number(values, "min_p", 0.0),
            repetition_penalty=_number(values, "repetition_penalty", 1.0),
        )
        return replace(defaults, temperature=0.0) if values.get("do_sample") is False else defaults


def _number(values: dict[str, object], name: str, default: float) -> float:
    value = values.get(name)
    return value if isinstance(value, int | float) else default


def sampling_params(
    request: GenerationFields, defaults: SamplingDefaults, *, num_logprobs: int | None, vocab_size: int, grammar: str | None = None
) -> SamplingParams:
    """The parameters of the request's first answer. Raises ApiError 400."""
    try:
        return SamplingParams(
            max_tokens=_max_tokens(request),
            min_tokens=request.min_tokens or request.min_new_tokens or 0,
            temperature=_given(request.temperature, defaults.temperature) if _is_sampled(request) else 0.0,
            top_p=_given(request.top_p, defaults.top_p),
            top_k=max(0, int(_given(request.top_k, defaults.top_k))),
            min_p=_given(request.min_p, defaults.min_p),
            repetition_penalty=_given(request.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=_logit_bias(request.logit_bias or {}, vocab_size),
            seed=request.seed,
            stop_token_ids=_stop_token_ids(request.stop_token_ids or [], vocab_size),
            ignore_eos=bool(request.ignore_eos),
            num_beams=request.num_beams or 1,
            logprobs=num_logprobs,
            prompt_logprobs=request.num_prompt_logprobs,
            grammar=grammar,
        )
    except InvalidRequestError as error:  # a checkpoint's generation config out of bounds
        raise bad_request("invalid_value", str(error), param=str(error).split(":")[0]) from error


def for_choice(params: SamplingParams, index: int) -> SamplingParams:
    """Answer `index` of n: the seed moves on by one each, and only the first reads the prompt."""
    if index == 0:
        return params
    seed = None if params.seed is None else (params.seed + index) & _MAX_SEED
    return replace(params, seed=seed, prompt_logprobs=None)


def _is_sampled(request: GenerationFields) -> bool:
    """Beams are sampled only on demand, as the reference's; what else is asked for is, unless its temperature says otherwise."""
    if request.do_sample is not None or (request.num_beams or 1) == 1:
        return request.do_sample is not False
    return any(value is not None for value in (request.temperature, request.top_p, request.top_k, request.min_p))


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _max_tokens(request: GenerationFields) -> int | None:
    """None: to the end of the window."""
    given = request.max_completion_tokens or request.max_tokens
    return request.default_max_tokens if given is None else given


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            allowed = f"keys are token ids from 0 to {vocab_size - 1}"
            raise bad_request("invalid_value", f"logit_bias: {key!r} is not allowed; {allowed}", param="logit_bias")
    return {int(key): value for key, value in bias.items()}


def _stop_token_ids(token_ids: list[int], vocab_size: int) -> tuple[int, ...]:
    for index, token_id in enumerate(token_ids):
        if token_id >= vocab_size:
            path = f"stop_token_ids[{index}]"
            raise bad_request("invalid_value", f"{path}: {token_id} is no token id; they end at {vocab_size - 1}", param=path)
    return tuple(token_ids)
