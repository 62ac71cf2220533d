"""The request of `/v1/embeddings`: OpenAI's, and with pictures."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from vlm_server.message_schema import ContentPart, UnicodeText
from vlm_server.protocol import TokenIds

MAX_INPUTS = 2048  # OpenAI's


def _item_kind(value: object) -> str:
    if not isinstance(value, list):
        return "<string>"
    return "<tokens>" if value and isinstance(value[0], int) else "<parts>"


def _input_kind(value: object) -> str:
    """One item, or a list of them."""
    is_several = isinstance(value, list) and not (value and isinstance(value[0], int | dict))
    return "<several>" if is_several else _item_kind(value)


Parts = Annotated[list[ContentPart], Field(min_length=1)]
Item = Annotated[
    Annotated[UnicodeText, Tag("<string>")] | Annotated[TokenIds, Tag("<tokens>")] | Annotated[Parts, Tag("<parts>")],
    Discriminator(_item_kind),
]


class EmbeddingsRequest(BaseModel):
    """Texts, token ids, or text and pictures together."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, description="One of the ids of GET /v1/models.")
    input: Annotated[
        Annotated[UnicodeText, Tag("<string>")]
        | Annotated[TokenIds, Tag("<tokens>")]
        | Annotated[Parts, Tag("<parts>")]
        | Annotated[list[Item], Field(min_length=1, max_length=MAX_INPUTS), Tag("<several>")],
        Discriminator(_input_kind),
    ] = Field(description="A text, token ids, a list of text and image_url parts that make one embedding, or several of these.")
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: little-endian float32 numbers.")
    dimensions: int | None = Field(None, ge=1, description="Only the model's own number: its embeddings cannot be shortened.")
    user: str | None = Field(None, description="Accepted, without effect.")

    def items(self) -> list[tuple[str, str | list[int] | list[dict[str, Any]]]]:
        """Path and content of each thing to embed."""
        match self.input:
            case str() | [int(), *_] | [BaseModel(), *_]:
                return [("input", _plain(self.input))]
            case several:
                return [(f"input[{index}]", _plain(item)) for index, item in enumerate(several)]


def _plain(item: Any) -> str | list[int] | list[dict[str, Any]]:
    if isinstance(item, list) and isinstance(item[0], BaseModel):
        return [part.as_dict() for part in item]
    return item  # type: ignore[no-any-return]
