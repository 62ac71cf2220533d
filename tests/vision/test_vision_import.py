from tests.vision.processes import python_prints


def test_importing_vision_loads_no_torch() -> None:
    program = (
        "import sys, vision, vision.decode, vision.fetcher, vision.service; print('torch' in sys.modules, 'torchvision' in sys.modules)"
    )

    assert python_prints(program) == "False False"


def test_torchvision_is_importable_after_vision() -> None:
    program = """
import vision, torch
from torchvision.transforms.v2 import functional
print(tuple(functional.resize(torch.zeros(3, 8, 6, dtype=torch.uint8), [4, 3]).shape))
"""

    assert python_prints(program) == "(3, 4, 3)"


def test_operators_that_torchvision_brings_are_not_declared_again() -> None:
    program = """
import sys, torch
theirs = torch.library.Library("torchvision", "DEF")  # as the compiled extension of a matching build does when it loads
theirs.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
theirs.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import vision
import torchvision.transforms.v2
print([finder._library for finder in sys.meta_path if type(finder).__module__ == "vision"])
"""

    assert python_prints(program) == "[None]"
