"""The engine's settings. Knows nothing of HTTP; reads nothing but what it is given."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from engine.log_lines import LOG_FORMATS, TEXT

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
AUTO_ALPHA = "auto"
DEFAULT_SESSION_LEN = 2048  # for checkpoints that state none

# The environment variable that names a folder of an engine process's own. Who starts the process removes it, however that ends.
FOLDER_VARIABLE = "VLM_ENGINE_FOLDER"

_SESSION_LEN_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len", "model_max_length")
_GPU = re.compile(r"\d+|(GPU|MIG)-[\w/-]+")  # as CUDA_VISIBLE_DEVICES names them


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One engine. `resolve()` fills what depends on the checkpoint; what depends on the device is settled in the engine process."""

    model_folder: str
    device: str = "auto"
    dtype: str = "auto"  # on CPU: float32
    load_in_8bit: bool = False  # the decoder's linear layers in int8
    lora_folder: str | None = None  # an adapter that is merged into the weights
    tp: int = 1
    gpus: tuple[str, ...] = ()  # CUDA devices by number or UUID, a rank each; none: those that the environment shows
    load_format: str = "auto"
    trust_remote_code: bool = False
    session_len: int | None = None  # slots of prompt and output together
    alpha: float | str = 1.0  # NTK factor of the rotary positions; auto: what session_len asks for
    max_batch_size: int = 64  # requests that hold blocks at once
    max_prefill_token_num: int = 512  # prompt slots computed in one step
    cache_block_seq_len: int = 16  # slots per block
    cache_max_entry_count: float | None = None  # < 1: share of the free memory; >= 1: blocks; None: 0.8 on CUDA, see README on CPU
    enable_prefix_caching: bool = True
    embedding_cache_bytes: int = 256 << 20
    encoder_share: float = 0.46  # of the time while rows decode, at most this much goes to pictures and prompts
    max_waiting: int = 1024  # requests; more are refused
    num_threads: int | None = None  # per rank, on CPU; None: cores / tp
    log_format: str = TEXT  # of the engine process's own lines
    seed: int = 0  # of dummy weights and of requests without their own seed

    def __post_init__(self) -> None:
        for name, is_valid, allowed in (
            ("device", self.device in DEVICES, " | ".join(DEVICES)),
            ("dtype", self.dtype in DTYPES, " | ".join(DTYPES)),
            ("load_format", self.load_format in LOAD_FORMATS, " | ".join(LOAD_FORMATS)),
            ("tp", self.tp >= 1, "at least 1"),
            ("gpus", _are_gpus(self.gpus), "numbers or UUIDs of CUDA devices, each once"),
            ("alpha", _is_alpha(self.alpha), "1 to 1000, or auto"),
            ("session_len", self.session_len is None or self.session_len >= 2, "at least 2"),
            ("max_batch_size", self.max_batch_size >= 1, "at least 1"),
            ("max_prefill_token_num", self.max_prefill_token_num >= 1, "at least 1"),
            ("cache_block_seq_len", self.cache_block_seq_len >= 1, "at least 1"),
            ("cache_max_entry_count", self.cache_max_entry_count is None or self.cache_max_entry_count > 0, "above 0"),
            ("log_format", self.log_format in LOG_FORMATS, " | ".join(LOG_FORMATS)),
            ("encoder_share", 0 < self.encoder_share < 1, "between 0 and 1"),
        ):
            if not is_valid:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed, only {allowed}")

    def resolve(self, model_config: dict[str, Any]) -> "EngineConfig":
        """A copy with `session_len` bounded by the checkpoint's `config.json`, and with `alpha` as a number.

        With an alpha above 1 the window may be longer than the checkpoint's: as long as is asked for, or as that alpha is right for.
        """
        text_config = model_config.get("text_config") or model_config
        limits = [text_config[key] for key in _SESSION_LEN_KEYS if isinstance(text_config.get(key), int)]
        limit = min(limits) if limits else DEFAULT_SESSION_LEN
        if self.alpha == AUTO_ALPHA:
            session_len = self.session_len or limit
            return replace(self, session_len=session_len, alpha=alpha_for(session_len, limit))
        alpha = float(self.alpha)
        session_len = min(self.session_len or limit, limit) if alpha == 1 else self.session_len or window_for(alpha, limit)
        return replace(self, session_len=session_len, alpha=alpha)


# Chinese-LLaMA-Alpaca's patch takes 1.1 · (length / 1024 - 1) beyond the 2048 positions that its models were trained on. Here the window
# stands for the length: a cache that requests share has to be rotated by one base.
_MARGIN = 1.1


def alpha_for(session_len: int, trained_len: int) -> float:
    """The NTK factor for a window of `session_len` tokens of a model that was trained on `trained_len`."""
    return 1.0 if session_len <= trained_len else _MARGIN * (2 * session_len / trained_len - 1)


def window_for(alpha: float, trained_len: int) -> int:
    """The window for which `alpha` is chosen; never shorter than the trained one."""
    return max(trained_len, round(trained_len * (alpha / _MARGIN + 1) / 2))


def _is_alpha(alpha: float | str) -> bool:
    return alpha == AUTO_ALPHA if isinstance(alpha, str) else math.isfinite(alpha) and 1 <= alpha <= 1000


def _are_gpus(gpus: tuple[str, ...]) -> bool:
    return all(map(_GPU.fullmatch, gpus)) and len(set(gpus)) == len(gpus)
