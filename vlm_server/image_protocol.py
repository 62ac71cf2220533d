"""The fields that say how a request's pictures are processed: pixel budgets per picture, and settings for all of them.

Checks shapes only. Which settings the served model has, and how many pixels the server allows, `picture_parts` knows.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vision.resolution import LEAST_BUDGET_PIXELS

_AT_LEAST = "Enlarge the picture to about as many pixels; above what the model takes anyway it makes no picture sharper."
_AT_MOST = "Reduce the picture to as many pixels, its aspect kept; fewer are fewer tokens where the model's tokens depend on the size."

Pixels = Annotated[int, Field(ge=1)]
MinPixels = Annotated[Pixels | None, Field(description=_AT_LEAST)]
MaxPixels = Annotated[Annotated[int, Field(ge=LEAST_BUDGET_PIXELS)] | None, Field(description=_AT_MOST)]

OnMediaError = Annotated[
    Literal["fail", "skip"] | None,
    Field(
        description="skip: answer as if a picture that cannot be had or read were not in the request, with a warning that names it; "
        "fail, the default: refuse the request."
    ),
]
ReturnImageSizes = Annotated[
    bool | None, Field(description="Return image_sizes: of each picture its size, the size that the model saw, and the way back.")
]


class PictureSize(BaseModel):
    """In the image processor's own words: pixels for Qwen2-VL, the longer side for Idefics3 and SmolVLM."""

    model_config = ConfigDict(extra="forbid")

    shortest_edge: Pixels | None = Field(None, description="Qwen2-VL: another name of min_pixels.")
    longest_edge: Pixels | None = Field(
        None, description="Qwen2-VL: another name of max_pixels. Idefics3, SmolVLM: the longer side, to which every picture is resized."
    )


class ImageSettings(BaseModel):
    """What a request may change of the model's image processor. One that this model does not have is refused."""

    model_config = ConfigDict(extra="forbid")

    min_pixels: MinPixels = None
    max_pixels: MaxPixels = None
    size: PictureSize | None = None
    do_image_splitting: bool | None = Field(None, description="Idefics3, SmolVLM: false for one tile per picture.")
    do_pan_and_scan: bool | None = Field(None, description="Gemma 3: true for crops of long pictures beside the whole.")
    pan_and_scan_min_crop_size: int | None = Field(None, description="Gemma 3: no crops with a shorter side.")
    pan_and_scan_max_num_crops: int | None = Field(None, description="Gemma 3: crops per picture at most.")
    pan_and_scan_min_ratio_to_activate: float | None = Field(None, description="Gemma 3: no crops of pictures less long than this ratio.")


class ProcessorSettings(ImageSettings):
    """Settings for all pictures of a request."""

    image: ImageSettings | None = Field(None, description="The same by medium, as LMDeploy's clients send it.")

    def as_dict(self) -> dict[str, Any]:
        """What was set."""
        return self.model_dump(exclude_none=True)
