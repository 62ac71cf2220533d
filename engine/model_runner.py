"""One rank: builds the model, sizes and owns the KV cache, and computes one plan at a time. All device work of the decoder starts here.

Knows nothing of requests' lives: a plan says what to compute, and logits come back.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from engine.attention.base import AttentionBackend, allocate_cache
from engine.attention.torch_backend import TorchAttention
from engine.batch import Batch, build_batch
from engine.config import EngineConfig
from engine.layers.packed import pack_linears
from engine.layers.parallel import ParallelGroup
from engine.layers.rotary import stretch
from engine.models.decoder import Decoder
from engine.models.fallback import FallbackDecoder, load_reference
from engine.models.lora import Lora, MergedCheckpoint
from engine.models.registry import UnsupportedModelError, eos_token_ids, fast_spec, load_config
from engine.models.weights import Checkpoint, check_names, fill, fill_module, open_checkpoint
from engine.reading import Reading, read_chunks
from engine.request import Chunk, Plan
from vision.encoder import VisionEncoder
from vision.tower_parts import compute_in_parts, layers_in_parts

logger = logging.getLogger(__name__)

CPU_CACHE_LIMIT_BYTES = 1 << 30  # without --cache-max-entry-count
CUDA_CACHE_SHARE = 0.8
# What a tower's operator takes at a time: enough to be fast, little enough to pause soon.
CPU_PART_PIXELS = 512 * 512
CPU_PART_ROWS = 256  # of linear layers and attentions: SigLIP-B's largest take 7 ms on two cores instead of 28, and 3 % more in all


@dataclass(frozen=True, slots=True)
class Executed:
    """What one plan gave. Only rank 0's is complete."""

    sample_ids: tuple[str, ...]  # the requests that sample
    logits: Tensor | None  # theirs: (num_samples, vocab_size) float32
    readings: dict[str, Reading]  # of the requests that read their prompts


class ModelRunner:
    """One rank's model and cache."""

    def __init__(self, config: EngineConfig, group: ParallelGroup, *, on_progress: Callable[[float], None] = lambda fraction: None) -> None:
        assert config.session_len is not None, "the config was not resolved"
        self.config = config
        self.group = group
        self.device = resolve_device(config.device, group.rank)
        self.lora = Lora(config.lora_folder) if config.lora_folder else None
        self.model_config = self._read_config()
        if self.lora:
            self.lora.resize(self.model_config)
        self.dtype = resolve_dtype(config.dtype, self.model_config, self.device)
        self.decoder, self.encoder = self._load(on_progress)
        self.part_pixels = CPU_PART_PIXELS if self.device.type == "cpu" else None  # that are encoded at a time
        if self.encoder and self.part_pixels:
            compute_in_parts(self.encoder.module, max_pixels=self.part_pixels)
            layers_in_parts(self.encoder.layers, max_rows=CPU_PART_ROWS)
        self.eos_token_ids = eos_token_ids(self.model_config, _generation_config(config.model_folder))
        self.num_blocks = self._count_blocks()
        caches = allocate_cache(
            self.decoder.layer_shapes,
            num_blocks=self.num_blocks,
            block_size=config.cache_block_seq_len,
            dtype=self.dtype,
            device=self.device,
        )
        self.attention: AttentionBackend = TorchAttention(caches, config.cache_block_seq_len)
        self._block_copies: tuple[tuple[tuple[int, int], ...], ...] = ()  # plans' that are still to be made
        self._warm_up()

    @property
    def vocab_size(self) -> int:
        return int(self.model_config.get_text_config().vocab_size)

    @property
    def hidden_size(self) -> int:
        return int(self.model_config.get_text_config().hidden_size)

    @torch.inference_mode()
    def execute(self, plan: Plan, embeddings: Mapping[bytes, Tensor]) -> Executed:
        """Compute a plan's chunks.

        embeddings: by content hash (num_image_tokens, hidden_size), of every picture that the plan's pieces name; used on rank 0 only.
        Raises torch.OutOfMemoryError; the plan's block copies are made then or before the next plan's, since no later plan names them.
        """
        self._copy_blocks(plan)
        batch = build_batch(plan, block_size=self.config.cache_block_seq_len, device=self.device)
        self.attention.prepare(batch)
        hidden = self.decoder.embed(batch.token_ids)
        if batch.image_rows:
            hidden = self._merge_images(hidden, batch, embeddings)
        hidden = self.decoder(hidden, batch.positions, self.attention)
        readings = read_chunks(batch, hidden, self.decoder.logits)
        logits = self.decoder.logits(hidden[batch.sample_rows]) if batch.sample_ids else None
        return Executed(batch.sample_ids, None if logits is None else logits.float(), readings)

    def _copy_blocks(self, plan: Plan) -> None:
        """Each plan's apart and in order: a later one may copy what an earlier one did. Not again, since the plan writes into them."""
        self._block_copies += (plan.block_copies,)
        while self._block_copies:
            self.attention.copy_blocks(self._block_copies[0])
            self._block_copies = self._block_copies[1:]

    def _merge_images(self, hidden: Tensor, batch: Batch, embeddings: Mapping[bytes, Tensor]) -> Tensor:
        """hidden, its image rows overwritten: rank 0 has the embeddings and gives the rows to the others."""
        hidden = hidden.clone()
        for rows in batch.image_rows:
            target = hidden[rows.start : rows.start + rows.num_tokens]
            if self.group.rank == 0:
                target.copy_(embeddings[rows.content_hash][rows.offset : rows.offset + rows.num_tokens])
            self.group.broadcast(target)
        return hidden

    def _read_config(self) -> PretrainedConfig:
        config = load_config(self.config.model_folder, trust_remote_code=self.config.trust_remote_code)
        assert isinstance(self.config.alpha, float), "the config was not resolved"
        if self.config.alpha != 1:
            stretch(config.get_text_config(), self.config.alpha)
        return config

    def _load(self, on_progress: Callable[[float], None]) -> tuple[Decoder | FallbackDecoder, VisionEncoder | None]:
        """The decoder, and on rank 0 the vision encoder of an image-text checkpoint."""
        config, spec = self.config, fast_spec(self.model_config)
        if spec is None:
            return self._load_fallback(on_progress)
        checkpoint = open_checkpoint(
            config.model_folder, self.model_config, load_format=config.load_format, dtype=self.dtype, seed=config.seed
        )
        if self.lora:
            checkpoint = MergedCheckpoint(checkpoint, self.lora)
        with torch.inference_mode():
            staging = torch.device("cpu") if config.load_in_8bit else self.device  # where a whole layer must fit only for a moment
            decoder = Decoder(spec, self.model_config.get_text_config(), group=self.group, dtype=self.dtype, device=staging)
            stages = decoder.stages(in_8bit=config.load_in_8bit)
            check_names([source for stage in stages for source in stage.sources()], checkpoint)
            for number, stage in enumerate(stages, 1):
                fill(stage.sources(), checkpoint)
                stage.finish()
                on_progress(number / len(stages))
            if staging != self.device:
                decoder.to(self.device)
        has_vision = getattr(self.model_config, "vision_config", None) is not None
        encoder = self._load_encoder(checkpoint) if has_vision and self.group.rank == 0 else None
        if encoder:
            pack_linears(encoder.module)
        return decoder, encoder

    def _load_encoder(self, checkpoint: Checkpoint) -> VisionEncoder:
        return VisionEncoder.build(
            self.model_config, dtype=self.dtype, device=self.device, load=lambda module: fill_module(module, checkpoint)
        )

    def _load_fallback(self, on_progress: Callable[[float], None]) -> tuple[FallbackDecoder, VisionEncoder | None]:
        if self.group.size > 1:
            raise UnsupportedModelError(f"{self.model_config.model_type} runs through transformers' own modules, which --tp cannot split")
        config = self.config
        model: PreTrainedModel = load_reference(
            config.model_folder,
            self._read_config(),
            load_format=config.load_format,
            dtype=self.dtype,
            device=self.device,
            seed=config.seed,
            trust_remote_code=config.trust_remote_code,
            on_progress=on_progress,
        )
        if self.lora:
            self.lora.merge_into(model)
        pack_linears(model, in_8bit=config.load_in_8bit)
        has_vision = getattr(self.model_config, "vision_config", None) is not None
        encoder = VisionEncoder.from_model(model) if has_vision else None
        with torch.inference_mode():
            return FallbackDecoder(model), encoder

    def _count_blocks(self) -> int:
        """Blocks that every rank has memory for; at least one full window."""
        block_bytes = self.config.cache_block_seq_len * sum(shape.slot_bytes(self.dtype) for shape in self.decoder.layer_shapes)
        num_blocks = count_blocks(self.config, block_bytes, free_bytes=_free_bytes(self.device), is_cuda=self.device.type == "cuda")
        if self.group.size > 1:
            smallest = torch.tensor(num_blocks, device=self.device)
            dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
            num_blocks = int(smallest)
        return num_blocks

    def _warm_up(self) -> None:
        """One prefill and one decode step, so that the first request pays for no lazy initialisation."""
        block_size = self.config.cache_block_seq_len
        num_tokens = min(8, block_size - 1, self.num_blocks * block_size - 1)
        if num_tokens > 0:
            self.execute(Plan((Chunk("warm-up", [0] * num_tokens, 0, [0]),)), {})
            self.execute(Plan((Chunk("warm-up", [0], num_tokens, [0]),)), {})


def count_blocks(config: EngineConfig, block_bytes: int, *, free_bytes: int, is_cuda: bool) -> int:
    """How many KV blocks to allocate.

    block_bytes: of one block over all layers of a rank (0 on a rank without KV heads).
    Raises UnsupportedModelError where not even one window of 2 blocks fits.
    """
    assert config.session_len is not None
    per_window = -(-config.session_len // config.cache_block_seq_len)
    useful = config.max_batch_size * per_window
    share = config.cache_max_entry_count
    if share is not None and share >= 1:
        return int(share)
    if block_bytes == 0:
        return useful
    if share is None and not is_cuda:
        limit_bytes = min(CPU_CACHE_LIMIT_BYTES, free_bytes)
    else:
        limit_bytes = int(free_bytes * (share or CUDA_CACHE_SHARE))
    num_blocks = min(limit_bytes // block_bytes, useful)
    if num_blocks < 2:
        raise UnsupportedModelError(
            f"{limit_bytes >> 20} MiB for the KV cache hold no 2 blocks of {block_bytes >> 10} KiB; raise --cache-max-entry-count"
        )
    return num_blocks


def resolve_device(name: str, rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UnsupportedModelError("--device cuda: this torch finds no CUDA device (a CPU build of torch cannot use one)")
    return torch.device("cuda", rank)


def check_devices(config: EngineConfig) -> None:
    """Raises UnsupportedModelError where a rank would have no CUDA device."""
    if config.gpus and not torch.cuda.is_available():
        raise UnsupportedModelError("--gpus: this torch finds no CUDA device (a CPU build of torch cannot use one); --only-cpu needs none")
    if resolve_device(config.device, 0).type == "cuda" and torch.cuda.device_count() < config.tp:
        asked = f"--gpus {','.join(config.gpus)}" if config.gpus else f"--tp {config.tp}"
        raise UnsupportedModelError(f"{asked}: only {torch.cuda.device_count()} CUDA devices are there, and each process needs one")


def resolve_dtype(name: str, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """`auto` is float32 on CPU, and on CUDA the checkpoint's own half precision (bfloat16 where it is stored in float32)."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cpu":
        return torch.float32
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16


def _generation_config(model_folder: str) -> dict[str, object]:
    path = Path(model_folder) / "generation_config.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
