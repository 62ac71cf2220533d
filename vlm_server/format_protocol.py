"""The fields that say what an answer must look like: `response_format` and `structured_outputs`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from vlm_server.message_schema import UnicodeText

MAX_CHOICES = 1024


def _schema_kind(value: object) -> str:
    return "<boolean>" if isinstance(value, bool) else "<string>" if isinstance(value, str) else "<object>"


_SchemaObject = Annotated[dict[str, Any], Tag("<object>")]
_SchemaBoolean = Annotated[bool, Tag("<boolean>")]
JsonSchema = Annotated[_SchemaObject | _SchemaBoolean, Discriminator(lambda value: "<boolean>" if isinstance(value, bool) else "<object>")]
JsonSchemaOrText = Annotated[_SchemaObject | _SchemaBoolean | Annotated[UnicodeText, Tag("<string>")], Discriminator(_schema_kind)]


class TextFormat(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["text"]


class JsonObjectFormat(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["json_object"]


class NamedJsonSchema(BaseModel):
    """A JSON schema. Answers are on one line and their properties in the schema's order."""

    model_config = ConfigDict(extra="allow", serialize_by_alias=True)

    name: UnicodeText | None = Field(None, description="For the reader; it has no effect.")
    description: UnicodeText | None = Field(None, description="For the reader; it has no effect.")
    schema_: JsonSchema = Field(alias="schema", description="The schema. One that cannot be followed is refused with the reason.")
    strict: bool | None = Field(None, description="Answers follow the schema in any case.")


class JsonSchemaFormat(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["json_schema"]
    json_schema: NamedJsonSchema = Field(description="The schema that the answer follows.")


class RegexFormat(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["regex_schema"]
    regex_schema: UnicodeText = Field(min_length=1, description="A regular expression that the whole answer matches.")


def _format_kind(value: object) -> str:
    return f"<{value.get('type') if isinstance(value, dict) else getattr(value, 'type', None)}>"


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")]
    | Annotated[RegexFormat, Tag("<regex_schema>")],
    Discriminator(
        _format_kind,
        custom_error_type="api:invalid_value",
        custom_error_message="an object whose type is text, json_object, json_schema or regex_schema",
    ),
]


class StructuredOutputs(BaseModel):
    """What the answer must be, in vLLM's words: exactly one of these."""

    KINDS: ClassVar[tuple[str, ...]] = ("json_", "regex", "choice", "grammar", "json_object")

    model_config = ConfigDict(extra="allow", serialize_by_alias=True)

    json_: JsonSchemaOrText | None = Field(None, alias="json", description="A JSON schema, as an object or as text.")
    regex: UnicodeText | None = Field(None, description="A regular expression that the whole answer matches.")
    choice: Annotated[list[Annotated[UnicodeText, Field(min_length=1)]], Field(max_length=MAX_CHOICES)] | None = Field(
        None, description="The answer is one of these."
    )
    grammar: UnicodeText | None = Field(None, description="A grammar in Lark's notation, or in GBNF.")
    json_object: bool | None = Field(None, description="The answer is any JSON object.")
