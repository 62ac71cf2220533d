"""Every decoder without a fast implementation, run through the reference's own modules with our paged attention registered.

All chunks of a step go through as one packed sequence; positions and the attention keep them apart. Not split over ranks.
"""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from engine.attention.base import AttentionBackend, AttentionRule, LayerShape
from engine.models.registry import UnsupportedModelError
from engine.models.weights import reference_class

ATTENTION_NAME = "vlm_paged"
_LAYER_TYPES = {"full_attention", "sliding_attention"}


class FallbackDecoder(nn.Module):
    """The same three methods as `Decoder`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        text = model.config.get_text_config()
        other_types = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
        if other_types or not model._supports_attention_backend:
            reason = ", ".join(sorted(other_types)) or "its own attention code"
            raise UnsupportedModelError(f"{model.config.model_type} cannot run on a paged cache because of {reason}")
        self.body: PreTrainedModel = getattr(model.base_model, "language_model", model.base_model)
        self.embedding: nn.Module = model.get_input_embeddings()
        self._given = _GivenHidden()
        self.head = _with_body(model, self._given)
        self.call = _AttentionCall()
        for module in self.body.modules():
            if getattr(module, "layer_idx", None) is not None:
                module.vlm_call = self.call
        self.layer_shapes = self._probe()

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids: (num_tokens,) int64 → (num_tokens, hidden_size)."""
        return self.embedding(token_ids)

    def forward(self, hidden: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        """hidden: (num_tokens, hidden_size); positions: (num_tokens,) or (3, num_tokens) → (num_tokens, hidden_size), normalised."""
        self.call.backend = attention
        position_ids = positions[None] if positions.dim() == 1 else positions[:, None]
        return self.body(inputs_embeds=hidden[None], position_ids=position_ids, use_cache=False).last_hidden_state[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (num_rows, hidden_size) → (num_rows, vocab_size), with whatever scaling or cap the model's head applies."""
        self._given.hidden = hidden[None]
        return self.head(inputs_embeds=hidden[None]).logits[0]

    def _probe(self) -> list[LayerShape]:
        """Each layer's KV heads, seen by sending one token through."""
        recorder = _Recorder()
        hidden = self.embed(torch.zeros(1, dtype=torch.int64, device=self.body.device))
        self.forward(hidden, torch.zeros(1, dtype=torch.int64, device=hidden.device), recorder)
        return [recorder.shapes[layer] for layer in range(len(recorder.shapes))]


class _AttentionCall:
    """Which backend the registered attention function uses: one per model, reached through its attention modules."""

    backend: AttentionBackend

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """query: (1, num_heads, num_tokens, dim); key, value alike with KV heads → (1, num_tokens, num_heads, dim)."""
        if kwargs.get("s_aux") is not None:
            raise UnsupportedModelError("attention sinks are not supported")
        scale = kwargs.get("scaling")
        rule = AttentionRule(query.shape[-1] ** -0.5 if scale is None else scale, kwargs.get("sliding_window"), kwargs.get("softcap"))
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return self.backend.attend(cast(int, module.layer_idx), query, key, value, rule)[None], None


def _with_body(model: PreTrainedModel, body: nn.Module) -> PreTrainedModel:
    """A shallow copy around another body: what remains of the model is its head. The original stays whole."""
    head = copy.copy(model)
    head._modules = dict(model._modules)
    setattr(head, model.base_model_prefix, body)
    return head


def _paged_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return cast(_AttentionCall, module.vlm_call)(module, query, key, value, **kwargs)


class _GivenHidden(nn.Module):
    """Stands in for a model's body: returns hidden states that were computed before."""

    hidden: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> "_BodyOutput":
        return _BodyOutput(last_hidden_state=self.hidden)


class _BodyOutput(BaseModelOutputWithPast):  # type: ignore[misc]
    """Image-text bodies return more, which their heads pass on unread: None here."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _Recorder:
    """An attention backend that computes nothing and notes shapes."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[2], value.shape[2])
        return query.new_zeros(*query.shape[:2], value.shape[2])

    def prepare(self, batch: Any) -> None: ...

    def copy_blocks(self, copies: tuple[tuple[int, int], ...]) -> None: ...


def load_reference(
    model_folder: str,
    config: PretrainedConfig,
    *,
    load_format: str,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    trust_remote_code: bool = False,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> PreTrainedModel:
    """The whole reference model, its decoder's attention being ours and its vision tower's the reference's default."""
    AttentionInterface.register(ATTENTION_NAME, _paged_attention)
    sub_configs = [name for name in ("text_config", "vision_config") if getattr(config, name, None) is not None]
    chosen = {name: ATTENTION_NAME if name == "text_config" else "sdpa" for name in sub_configs} or ATTENTION_NAME
    auto_class = reference_class(config)
    if load_format == "dummy":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = auto_class.from_config(config, dtype=dtype, attn_implementation=chosen)
    else:
        model = auto_class.from_pretrained(
            model_folder, config=config, dtype=dtype, attn_implementation=chosen, trust_remote_code=trust_remote_code
        )
    on_progress(1.0)
    return model.to(device).eval().requires_grad_(False)
