"""The adapter table: how each image-text family turns a picture into prompt tokens, spans, positions and embeddings.

One short entry per `model_type` of `config.json`; a new family is a new entry. The towers, projectors and processors themselves are the
reference library's. Imports no torch: the server process uses this file too. Knows nothing of requests, of resizing or of scheduling.

Axes: T = tiles of a picture, C = 3 colours, H, W = height and width, N = rows of a picture's embedding, D = the decoder's width.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

MEAN_AND_STD = "mean_and_std"  # (2, 3) float32 beside uint8 pixels: (pixels - mean) / std is what the tower takes

Layout = dict[str, Any]  # plain numbers: what one picture's placeholder expands to
Settings = Mapping[str, Any]  # the checkpoint's own numbers and token names
Arrays = dict[str, np.ndarray]  # one picture's encoder inputs; pixel_values: (T, C, H, W) in every family
TensorBatch = Sequence[Mapping[str, "torch.Tensor"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """One family's entry."""

    placeholder: str = "<image>"  # what the chat template writes for a picture, unless the checkpoint names another
    arrange: Callable[[Settings, Arrays, tuple[int, int]], tuple[Arrays, Layout]]  # from the image processor's outputs and (height, width)
    expand: Callable[[Settings, Layout], str]
    encode: Callable[[Any, TensorBatch], "list[torch.Tensor]"]
    image_token: str | None = None  # the token whose slots take embedding rows; None: the placeholder
    processor_options: Mapping[str, Any] = field(default_factory=dict)  # what the family's processor asks of its image processor
    grid: Callable[[Layout], tuple[int, int]] | None = None  # rows and columns of embeddings, for three-axis positions
    is_atomic: bool = False  # a picture's slots attend to each other in both directions


@dataclass(frozen=True, slots=True)
class Family:
    """What one checkpoint asks of its pictures."""

    model_type: str
    placeholder: str
    image_token: str
    image_token_id: int
    settings: Settings
    rules: Rules

    @property
    def is_atomic(self) -> bool:
        return self.rules.is_atomic

    @property
    def has_positions(self) -> bool:
        return self.rules.grid is not None

    @property
    def reserved(self) -> tuple[str, ...]:
        """Strings that mean a picture to the tokenizer or the template: a user's text must never be taken for them."""
        return tuple(dict.fromkeys((self.placeholder, self.image_token)))

    def arrange(self, outputs: Arrays, size: tuple[int, int]) -> tuple[Arrays, Layout]:
        """The encoder's inputs and the numbers that the placeholder is expanded from.

        outputs: the image processor's, for one picture of `size` = (height, width).
        """
        return self.rules.arrange(self.settings, outputs, size)

    def expand(self, layout: Layout) -> str:
        """The text that takes the placeholder's place, as the reference processor writes it."""
        return self.rules.expand(self.settings, layout)

    def num_tokens(self, layout: Layout) -> int:
        return self.expand(layout).count(self.image_token)

    def positions(self, num_slots: int, images: Sequence[tuple[int, Layout]]) -> tuple[tuple[tuple[int, ...], ...] | None, int]:
        """Three rows of positions (time, height, width), each `num_slots` long, and the delta for slots beyond them.

        `images`: first slot and layout of each picture, in prompt order. (None, 0) for families that count 0, 1, 2, …
        """
        if self.rules.grid is None:
            return None, 0
        return _three_axis_positions(num_slots, [(start, *self.rules.grid(layout)) for start, layout in images])


def load_family(model_folder: str | Path) -> Family | None:
    """The family of the checkpoint in `model_folder`; None where it takes no pictures.

    Raises ValueError where its configuration holds a vision part of a family that is not in the table.
    """
    folder = Path(model_folder)
    config = _read_json(folder / "config.json")
    model_type = config.get("model_type", "")
    if model_type not in FAMILIES:
        if "vision_config" in config:
            raise ValueError(f"model_type {model_type!r} is not a known image-text family; known are {', '.join(sorted(FAMILIES))}")
        return None
    rules = FAMILIES[model_type]
    settings = _settings(folder, config)
    placeholder = _named_token(settings, "boi_token" if rules.image_token else "image_token") or rules.placeholder
    image_token = (_named_token(settings, "image_token") or rules.image_token) if rules.image_token else placeholder
    image_token_id = config.get("image_token_id", config.get("image_token_index"))
    if image_token_id is None:
        raise ValueError(f"{folder / 'config.json'} names no image_token_id")
    return Family(model_type, placeholder, image_token or placeholder, image_token_id, settings, rules)


def _read_json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _settings(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The processor's own file first, then what it would be computed from."""
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    processor = _read_json(folder / "processor_config.json")
    image_processor = _read_json(folder / "preprocessor_config.json") or processor.get("image_processor") or {}
    return {
        **{key: value for key, value in tokenizer_config.items() if key.endswith("_token")},
        "config": config,
        "image_processor": image_processor,
        **{key: value for key, value in processor.items() if value is not None},
    }


def _named_token(settings: Settings, key: str) -> str | None:
    token = settings.get(key)
    return token.get("content") if isinstance(token, dict) else token


def normalize(pixels: "torch.Tensor", mean_and_std: "torch.Tensor") -> "torch.Tensor":
    """float32 (T, C, H, W) of uint8 pixels, with the reference's own two operations.

    mean_and_std: (2, 3) float32 on the pixels' device, in units of 0 to 255.
    """
    mean, std = mean_and_std[..., None, None]
    return pixels.float().sub_(mean).div_(std)


# --- LLaVA: one picture of a fixed size -----------------------------------------------------------------------------------------------


def _arrange_llava(settings: Settings, outputs: Arrays, size: tuple[int, int]) -> tuple[Arrays, Layout]:
    pixels = outputs["pixel_values"]
    return {"pixel_values": pixels}, {"num_tokens": _num_tile_tokens(settings, *pixels.shape[-2:])}


def _num_tile_tokens(settings: Settings, height: int, width: int) -> int:
    """Patches of one tile, with or without the tower's class token."""
    patch_size = settings.get("patch_size") or settings["config"]["vision_config"]["patch_size"]
    strategy = settings.get("vision_feature_select_strategy") or settings["config"].get("vision_feature_select_strategy", "default")
    num_tokens = (height // patch_size) * (width // patch_size) + int(settings.get("num_additional_image_tokens", 0))
    return num_tokens - 1 if strategy == "default" else num_tokens


def _expand_repeated(settings: Settings, layout: Layout) -> str:
    return str(_named_token(settings, "image_token") or "<image>") * int(layout["num_tokens"])


def _encode_llava(model: Any, batch: TensorBatch) -> "list[torch.Tensor]":
    features = model.get_image_features(pixel_values=_joined(batch, "pixel_values"), return_dict=True).pooler_output
    return list(features)


def _joined(batch: TensorBatch, name: str) -> "torch.Tensor":
    import torch

    return torch.cat([arrays[name] for arrays in batch])


# --- Three-axis positions --------------------------------------------------------------------------------------------------------------


def _three_axis_positions(num_slots: int, grids: Sequence[tuple[int, int, int]]) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Text counts on on all three axes; a picture stands still in time, counts its rows and columns, and takes as many as its longer side.

    grids: first slot, rows and columns of each picture, in prompt order.
    """
    parts: list[np.ndarray] = []
    slot = position = 0
    for start, rows, columns in grids:
        parts += [_text_positions(position, start - slot), _picture_positions(position + start - slot, rows, columns)]
        position += start - slot + max(rows, columns)
        slot = start + rows * columns
    parts.append(_text_positions(position, num_slots - slot))
    axes = np.concatenate(parts, axis=1).tolist()
    return tuple(map(tuple, axes)), position - slot


def _text_positions(first: int, num_slots: int) -> np.ndarray:
    return np.broadcast_to(np.arange(first, first + num_slots), (3, num_slots))


def _picture_positions(first: int, rows: int, columns: int) -> np.ndarray:
    return np.stack([np.zeros((rows, columns), dtype=int), *np.indices((rows, columns))]).reshape(3, -1) + first


# --- The table ------------------------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Rules] = {
    "llava": Rules(arrange=_arrange_llava, expand=_expand_repeated, encode=_encode_llava),
}
