"""Everything a picture goes through, from its URL to its embedding.

Importing this package makes `torchvision` importable beside a CPU-only torch: the usual torchvision is built against CUDA, its compiled
operators do not load there, and it then fails on import because it annotates two operators that nobody declared. They are declared here,
without code: no image processor calls them. torch itself is not loaded before torchvision is: the decode workers live without it.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_AFTER_ITS_OPERATORS = "torchvision._meta_registrations"  # torchvision tried to load its operators, and now needs them
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _MissingOperators(MetaPathFinder):
    """Finds no module; declares torchvision's operators when torchvision could not load its own."""

    def __init__(self) -> None:
        self._library: object = None  # the declarations live as long as it does

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname == _AFTER_ITS_OPERATORS and self._library is None:
            self._declare()
        return None

    def _declare(self) -> None:
        import torch

        if hasattr(torch.ops.torchvision, "nms"):
            return
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for schema in _SCHEMAS:
            library.define(schema)  # type: ignore[no-untyped-call]
        self._library = library


sys.meta_path.insert(0, _MissingOperators())
