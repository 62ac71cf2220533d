"""Vision tower and projector of one checkpoint: encoder inputs → embedding rows.

Built from the reference library's own modules, without the language model. Runs in the engine process, on the engine's device.
Knows nothing of requests, caches or scheduling.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from vision.families import FAMILIES, MEAN_AND_STD, normalize

_LANGUAGE_MODELS = ("language_model", "text_model")


class _Array(Protocol):
    """A tensor, or an array in shared memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> object: ...


class VisionEncoder:
    """`module` holds tower and projector under the reference's parameter names; `layers` are the tower's, in order of use."""

    def __init__(self, module: PreTrainedModel) -> None:
        self.module = module
        self.layers: list[nn.Module] = _tower_layers(module)
        self._encode = FAMILIES[module.config.model_type].encode
        self._dtype = next(parameter.dtype for name, parameter in module.named_parameters() if not _is_language(name))

    @classmethod
    def build(
        cls, config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device | str, load: Callable[[nn.Module], None]
    ) -> "VisionEncoder":
        """Tower and projector on `device`, their parameters filled by `load`, which gets the module and writes into them by name.

        Raises RuntimeError naming the parameters that `load` left unwritten.
        """
        with _parameters_on_meta():
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        _drop_language_model(model)
        _allocate(model, device)
        load(model)
        unwritten = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
        if unwritten:
            raise RuntimeError(f"the checkpoint holds no values, or NaN, for {', '.join(unwritten[:8])}")
        return cls(model.eval())

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> "VisionEncoder":
        """The tower and projector of a whole model that is loaded anyway; nothing is copied."""
        return cls(model)

    def batch_key(self, arrays: Mapping[str, _Array]) -> tuple[object, ...]:
        """Pictures with equal keys may be encoded in one batch; they may differ in their number of tiles."""
        return tuple((name, str(array.dtype), tuple(array.shape[1:])) for name, array in sorted(arrays.items()))

    @torch.inference_mode()
    def encode(self, batch: Sequence[Mapping[str, torch.Tensor]]) -> list[torch.Tensor]:
        """One (num_tokens, hidden_size) tensor per picture, model dtype, on the module's device.

        batch: pictures of one `batch_key`, on the module's device, as `ImagePreprocessor` gave them.
        """
        return self._encode(self.module, [self._normalized(arrays) for arrays in batch])

    def _normalized(self, arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pixels = arrays["pixel_values"]
        if MEAN_AND_STD in arrays:
            pixels = normalize(pixels, arrays[MEAN_AND_STD])
        return {**arrays, "pixel_values": pixels.to(self._dtype)}


def _is_language(name: str) -> bool:
    return name.startswith("lm_head") or any(part in _LANGUAGE_MODELS for part in name.split("."))


def _tower_layers(module: PreTrainedModel) -> list[nn.Module]:
    """The longest list of modules outside the language model."""
    lists = [list(child) for name, child in module.named_modules() if isinstance(child, nn.ModuleList) and not _is_language(name)]
    return max(lists, key=len, default=[])


def _drop_language_model(model: PreTrainedModel) -> None:
    for owner in (model, model.base_model):
        for name in (*_LANGUAGE_MODELS, "lm_head"):
            if name in owner._modules:
                owner._modules[name] = None


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside hold their parameters without memory, but compute their buffers for real.

    Rotary frequencies and position ids are in no checkpoint: on the meta device they would be lost.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _allocate(model: nn.Module, device: torch.device | str) -> None:
    """NaN for every parameter, so that what nobody writes is seen; buffers move as they are."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                values = torch.full(parameter.shape, torch.nan, dtype=parameter.dtype, device=device)
                module._parameters[name] = nn.Parameter(values, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
