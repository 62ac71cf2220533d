"""The requests of LMDeploy's `/generate` and `/abort_request`. Checks shape and bounds only."""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from vlm_server.aborting import NO_SESSION
from vlm_server.image_protocol import OnMediaError, ReturnImageSizes
from vlm_server.message_schema import ImageUrl, UnicodeText
from vlm_server.protocol import GenerationFields, TokenIds

MAX_PICTURES = 1024

_Picture = Annotated[
    Annotated[UnicodeText, Tag("<string>")] | Annotated[ImageUrl, Tag("<object>")],
    Discriminator(lambda value: "<string>" if isinstance(value, str) else "<object>"),
]


def _pictures_kind(value: object) -> str:
    return "<list>" if isinstance(value, list) else "<string>" if isinstance(value, str) else "<object>"


class GenerateReqInput(GenerationFields):
    """A text or its token ids, with pictures or without, to be continued without a chat template."""

    default_max_tokens: ClassVar[int | None] = 128
    continues_prompt: ClassVar[bool] = True

    model: str | None = Field(None, description="One of the ids of GET /v1/models; may be left out.")  # type: ignore[assignment]
    n: int | None = Field(None, ge=1, le=1, description="Only 1.")
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="New tokens at most. Default: 128.")
    stream_options: None = Field(None, description="Only null: every piece says what it cost so far.")
    prompt: Annotated[UnicodeText, Field(min_length=1)] | None = Field(None, description="A text; or else input_ids.")
    input_ids: TokenIds | None = Field(None, validate_default=True, description="Token ids; or else a prompt.")
    image_data: (
        Annotated[
            Annotated[list[_Picture], Field(max_length=MAX_PICTURES), Tag("<list>")]
            | Annotated[UnicodeText, Tag("<string>")]
            | Annotated[ImageUrl, Tag("<object>")],
            Discriminator(_pictures_kind),
        ]
        | None
    ) = Field(
        None,
        description="A picture's URL, an object with its url, or a list of these. They stand at the model's picture placeholders in the "
        "prompt or the input_ids where there are as many, else before the text.",
    )
    on_media_error: OnMediaError = None
    return_image_sizes: ReturnImageSizes = None
    return_logprob: bool | None = Field(None, description="Return each new token's log probability and id.")

    @field_validator("input_ids")
    @classmethod
    def _one_of_two(cls, value: list[int] | None, info: ValidationInfo) -> list[int] | None:
        if "prompt" in info.data and (value is None) == (info.data["prompt"] is None):
            raise PydanticCustomError("api:invalid_value", "give either prompt or input_ids")
        return value

    @property
    def input_field(self) -> str:  # type: ignore[override]
        return "prompt" if self.input_ids is None else "input_ids"

    @property
    def num_logprobs(self) -> int | None:
        return 0 if self.return_logprob else None

    @property
    def text_or_ids(self) -> str | list[int]:
        given = self.prompt if self.input_ids is None else self.input_ids
        assert given is not None
        return given

    def pictures(self) -> list[dict[str, Any]]:
        """Objects as `image_url` of a chat's part."""
        given = self.image_data if isinstance(self.image_data, list) else [self.image_data] if self.image_data else []
        return [{"url": picture} if isinstance(picture, str) else picture.model_dump(exclude_unset=True) for picture in given]

    def picture_fields(self) -> list[str]:
        """The field's path of each of `pictures`."""
        return [f"image_data[{index}]" if isinstance(self.image_data, list) else "image_data" for index in range(len(self.pictures()))]


class AbortRequest(BaseModel):
    """Which requests are to end. A null field is as good as an absent one."""

    model_config = ConfigDict(extra="allow")

    abort_all: bool = Field(False, description="All requests of this API key but turns of /v1/chat/interactive, which are cancelled there.")
    session_id: int = Field(NO_SESSION, ge=-(2**63), lt=2**63, description="Those that were sent with this number.")

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_absent(cls, value: object, info: ValidationInfo) -> object:
        assert info.field_name
        return cls.model_fields[info.field_name].default if value is None else value
