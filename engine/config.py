"""The engine's settings. Knows nothing of HTTP; reads nothing but what it is given."""

from dataclasses import dataclass, replace
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
DEFAULT_SESSION_LEN = 2048  # for checkpoints that state none

_SESSION_LEN_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len", "model_max_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One engine. `resolve()` fills what depends on the checkpoint; what depends on the device is settled in the engine process."""

    model_folder: str
    device: str = "auto"
    dtype: str = "auto"  # on CPU: float32
    load_in_8bit: bool = False  # the decoder's linear layers in int8
    lora_folder: str | None = None  # an adapter that is merged into the weights
    tp: int = 1
    load_format: str = "auto"
    trust_remote_code: bool = False
    session_len: int | None = None  # slots of prompt and output together
    max_batch_size: int = 64  # requests that hold blocks at once
    max_prefill_token_num: int = 512  # prompt slots computed in one step
    cache_block_seq_len: int = 16  # slots per block
    cache_max_entry_count: float | None = None  # < 1: share of the free memory; >= 1: blocks; None: 0.8 on CUDA, see README on CPU
    enable_prefix_caching: bool = True
    embedding_cache_bytes: int = 256 << 20
    encoder_share: float = 0.5  # of the time while rows decode, at most this much goes to encoding pictures
    max_waiting: int = 1024  # requests; more are refused
    num_threads: int | None = None  # per rank, on CPU; None: cores / tp
    seed: int = 0  # of dummy weights and of requests without their own seed

    def __post_init__(self) -> None:
        for name, is_valid, allowed in (
            ("device", self.device in DEVICES, " | ".join(DEVICES)),
            ("dtype", self.dtype in DTYPES, " | ".join(DTYPES)),
            ("load_format", self.load_format in LOAD_FORMATS, " | ".join(LOAD_FORMATS)),
            ("tp", self.tp >= 1, "at least 1"),
            ("session_len", self.session_len is None or self.session_len >= 2, "at least 2"),
            ("max_batch_size", self.max_batch_size >= 1, "at least 1"),
            ("max_prefill_token_num", self.max_prefill_token_num >= 1, "at least 1"),
            ("cache_block_seq_len", self.cache_block_seq_len >= 1, "at least 1"),
            ("cache_max_entry_count", self.cache_max_entry_count is None or self.cache_max_entry_count > 0, "above 0"),
            ("encoder_share", 0 < self.encoder_share < 1, "between 0 and 1"),
        ):
            if not is_valid:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed, only {allowed}")

    def resolve(self, model_config: dict[str, Any]) -> "EngineConfig":
        """A copy with `session_len` bounded by the checkpoint's `config.json`."""
        text_config = model_config.get("text_config") or model_config
        limits = [text_config[key] for key in _SESSION_LEN_KEYS if isinstance(text_config.get(key), int)]
        limit = min(limits) if limits else DEFAULT_SESSION_LEN
        return replace(self, session_len=min(self.session_len or limit, limit))
