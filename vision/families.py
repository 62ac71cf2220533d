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

from vision.geometry import View, Views, of_crops, of_one_tile, of_patches, of_pinpoints, of_rows_and_columns
from vision.resolution import FIXED_SIZE, GEMMA3, IDEFICS3, LLAVA_NEXT, QWEN_VL, Resolution

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
    views: Views  # where in the picture the pixels lie that the encoder is given
    image_token: str | None = None  # the token whose slots take embedding rows; None: the placeholder
    processor_options: Mapping[str, Any] = field(default_factory=dict)  # what the family's processor asks of its image processor
    grid: Callable[[Layout], tuple[int, int]] | None = None  # rows and columns of embeddings, for three-axis positions
    is_atomic: bool = False  # a picture's slots attend to each other in both directions
    frame: tuple[str, str] = ("", "")  # what a chat template writes before and after the placeholder
    gap: str = ""  # what it writes between a picture and its neighbours
    resolution: Resolution = FIXED_SIZE


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
    def framed_placeholder(self) -> str:
        """What a chat template that knows no pictures should write for one."""
        before, after = self.rules.frame
        return before + self.placeholder + after

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

    def views(self, processor: Settings, layout: Layout, tiles: tuple[int, ...], picture: View) -> list[View]:
        """What the encoder sees of a picture, the whole first; none where this image processor does not do as the family's own.

        processor: its settings for this picture. tiles: the shape of `pixel_values`. picture: as the image processor was given it.
        """
        num_tiles, _, height, width = tiles
        try:
            views = self.rules.views(processor, layout, (height, width), picture)
        except KeyError:  # a setting that the family's own image processor has
            return []
        return views if sum(view.width * view.height for view in views) == num_tiles * height * width else []

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
    extra = tokenizer_config.get("extra_special_tokens") or {}
    named = {
        **tokenizer_config,
        **(tokenizer_config.get("model_specific_special_tokens") or {}),
        **(extra if isinstance(extra, dict) else {}),
    }
    return {
        **{key: value for key, value in named.items() if key.endswith("_token")},
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
    patch_size = _patch_size(settings)
    strategy = settings.get("vision_feature_select_strategy") or settings["config"].get("vision_feature_select_strategy", "default")
    num_tokens = (height // patch_size) * (width // patch_size) + int(settings.get("num_additional_image_tokens", 0))
    return num_tokens - 1 if strategy == "default" else num_tokens


def _patch_size(settings: Settings) -> int:
    return int(settings.get("patch_size") or settings["config"]["vision_config"]["patch_size"])


def _expand_repeated(settings: Settings, layout: Layout) -> str:
    return str(_named_token(settings, "image_token") or "<image>") * int(layout["num_tokens"])


def _encode_llava(model: Any, batch: TensorBatch) -> "list[torch.Tensor]":
    features = model.get_image_features(pixel_values=_joined(batch, "pixel_values"), return_dict=True).pooler_output
    return list(features)


def _joined(batch: TensorBatch, name: str) -> "torch.Tensor":
    import torch

    return torch.cat([arrays[name] for arrays in batch])


# --- LLaVA-NeXT: the whole picture, then tiles of it in its own aspect, each row of patches ended by a newline ---------------------------


def _arrange_llava_next(settings: Settings, outputs: Arrays, size: tuple[int, int]) -> tuple[Arrays, Layout]:
    pixels = outputs["pixel_values"][0]
    tile_height, tile_width = pixels.shape[-2:]
    num_tokens = _num_tile_tokens(settings, tile_height, tile_width) + _num_detail_tokens(settings, size, tile_height, tile_width)
    return {"pixel_values": pixels, "image_sizes": outputs["image_sizes"]}, {"num_tokens": num_tokens}


def _num_detail_tokens(settings: Settings, size: tuple[int, int], tile_height: int, tile_width: int) -> int:
    """Patches of all tiles that show the picture and not the border around it, and a newline per row."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = size
    patch_size = _patch_size(settings)
    pinpoints = settings["image_processor"].get("image_grid_pinpoints") or settings["config"]["image_grid_pinpoints"]
    best_height, best_width = select_best_resolution(size, pinpoints)
    rows = best_height // tile_height * (tile_height // patch_size)
    columns = best_width // tile_width * (tile_width // patch_size)
    if width / height > columns / rows:
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    return rows * columns + rows


def _encode_llava_next(model: Any, batch: TensorBatch) -> "list[torch.Tensor]":
    pixels, sizes = _joined(batch, "pixel_values"), _joined(batch, "image_sizes")
    return list(model.get_image_features(pixel_values=pixels, image_sizes=sizes, return_dict=True).pooler_output)


# --- Idefics3, SmolVLM: tiles with row and column tokens, then the whole picture --------------------------------------------------------


def _arrange_idefics3(settings: Settings, outputs: Arrays, size: tuple[int, int]) -> tuple[Arrays, Layout]:
    rows, columns = (int(outputs[name][0][0]) for name in ("rows", "cols"))
    layout = {"rows": rows, "columns": columns, "tokens_per_tile": int(settings.get("image_seq_len") or 169)}
    return {"pixel_values": outputs["pixel_values"][0]}, layout


def _expand_idefics3(settings: Settings, layout: Layout) -> str:
    fake = _named_token(settings, "fake_image_token") or "<fake_token_around_image>"
    tile = (_named_token(settings, "image_token") or "<image>") * layout["tokens_per_tile"]
    whole = fake + (_named_token(settings, "global_image_token") or "<global-img>") + tile + fake
    if not layout["rows"]:
        return whole
    tiles = [[f"{fake}<row_{row}_col_{column}>{tile}" for column in _from_one(layout["columns"])] for row in _from_one(layout["rows"])]
    return "".join("".join(row) + "\n" for row in tiles) + "\n" + whole


def _from_one(count: int) -> range:
    return range(1, count + 1)


def _encode_idefics3(model: Any, batch: TensorBatch) -> "list[torch.Tensor]":
    features = model.get_image_features(pixel_values=_joined(batch, "pixel_values")[None], return_dict=True).pooler_output
    return _split_by_tiles(features[0], batch)


def _split_by_tiles(rows: "torch.Tensor", batch: TensorBatch) -> "list[torch.Tensor]":
    """rows: (embedding rows of all tiles, D); every tile has as many."""
    counts = [len(arrays["pixel_values"]) for arrays in batch]
    rows_per_tile = len(rows) // sum(counts)
    return list(rows.split([count * rows_per_tile for count in counts]))


# --- Qwen2-VL, Qwen2.5-VL: any size, cut into patches; positions in three axes -----------------------------------------------------------


def _arrange_qwen_vl(settings: Settings, outputs: Arrays, size: tuple[int, int]) -> tuple[Arrays, Layout]:
    """The processor repeats a still picture as the next frame of a video; it travels once, and T counts patches."""
    vision = settings["config"]["vision_config"]
    patch_size, num_frames, merge_size = (
        vision.get(name, default) for name, default in (("patch_size", 14), ("temporal_patch_size", 2), ("spatial_merge_size", 2))
    )
    _, rows, columns = (int(number) for number in outputs["image_grid_thw"][0])
    patches = outputs["pixel_values"].reshape(rows * columns, -1, num_frames, patch_size, patch_size)[:, :, 0]
    layout = {"rows": rows // merge_size, "columns": columns // merge_size}
    return {"pixel_values": np.ascontiguousarray(patches), "image_grid_thw": outputs["image_grid_thw"]}, layout


def _expand_qwen_vl(settings: Settings, layout: Layout) -> str:
    return (_named_token(settings, "image_token") or "<|image_pad|>") * (layout["rows"] * layout["columns"])


def _grid_of_qwen_vl(layout: Layout) -> tuple[int, int]:
    return layout["rows"], layout["columns"]


def _encode_qwen_vl(model: Any, batch: TensorBatch) -> "list[torch.Tensor]":
    patches = _joined(batch, "pixel_values")
    num_frames = model.config.vision_config.temporal_patch_size
    frames = patches.unsqueeze(2).expand(-1, -1, num_frames, -1, -1).flatten(1)
    grids = _joined(batch, "image_grid_thw")
    return list(model.get_image_features(pixel_values=frames, image_grid_thw=grids, return_dict=True).pooler_output)


# --- Gemma-3: a fixed number of tokens that see each other; crops where pan and scan is on -----------------------------------------------


def _arrange_gemma3(settings: Settings, outputs: Arrays, size: tuple[int, int]) -> tuple[Arrays, Layout]:
    layout = {"num_crops": int(outputs["num_crops"][0]), "tokens_per_tile": int(settings.get("image_seq_length") or 256)}
    return {"pixel_values": outputs["pixel_values"]}, layout


def _expand_gemma3(settings: Settings, layout: Layout) -> str:
    begin, token, end = (
        _named_token(settings, name) or default
        for name, default in (("boi_token", "<start_of_image>"), ("image_token", "<image_soft_token>"), ("eoi_token", "<end_of_image>"))
    )
    whole = f"\n\n{begin}{token * layout['tokens_per_tile']}{end}\n\n"
    if not layout["num_crops"]:
        return whole
    crops = " ".join([whole] * layout["num_crops"])
    return f"Here is the original image {whole} and here are some crops to help you see better {crops}"


def _encode_gemma3(model: Any, batch: TensorBatch) -> "list[torch.Tensor]":
    features = model.get_image_features(pixel_values=_joined(batch, "pixel_values"), return_dict=True).pooler_output
    return _split_by_tiles(features.flatten(0, 1), batch)


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

_IDEFICS3 = Rules(
    arrange=_arrange_idefics3,
    expand=_expand_idefics3,
    encode=_encode_idefics3,
    views=of_rows_and_columns,
    processor_options={"return_row_col_info": True},
    resolution=IDEFICS3,
)
_QWEN_VL = Rules(
    placeholder="<|image_pad|>",
    frame=("<|vision_start|>", "<|vision_end|>"),
    arrange=_arrange_qwen_vl,
    expand=_expand_qwen_vl,
    encode=_encode_qwen_vl,
    views=of_patches,
    grid=_grid_of_qwen_vl,
    resolution=QWEN_VL,
)
_PAN_AND_SCAN = {
    "do_pan_and_scan": False,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
FAMILIES: dict[str, Rules] = {
    "llava": Rules(gap="\n", arrange=_arrange_llava, expand=_expand_repeated, encode=_encode_llava, views=of_one_tile),
    "llava_next": Rules(
        gap="\n",
        arrange=_arrange_llava_next,
        expand=_expand_repeated,
        encode=_encode_llava_next,
        views=of_pinpoints,
        resolution=LLAVA_NEXT,
    ),
    "idefics3": _IDEFICS3,
    "smolvlm": _IDEFICS3,
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "gemma3": Rules(
        placeholder="<start_of_image>",
        image_token="<image_soft_token>",
        arrange=_arrange_gemma3,
        expand=_expand_gemma3,
        encode=_encode_gemma3,
        views=of_crops,
        processor_options=_PAN_AND_SCAN,
        is_atomic=True,
        resolution=GEMMA3,
    ),
}
