"""The fields that say what an answer must look like: `response_format` and `structured_outputs`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from vlm_server.message_schema import UnicodeText

MAX_CHOICES = 1024

JsonSchema = dict[str, Any] | bool


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
    json_schema: NamedJsonSchema


class RegexFormat(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["regex_schema"]
    regex_schema: UnicodeText = Field(min_length=1, description="A regular expression that the whole answer matches.")


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat, Field(discriminator="type")]


class StructuredOutputs(BaseModel):
    """What the answer must be, in vLLM's words: exactly one of these."""

    KINDS: ClassVar[tuple[str, ...]] = ("json_", "regex", "choice", "grammar", "json_object")

    model_config = ConfigDict(extra="allow", serialize_by_alias=True)

    json_: JsonSchema | UnicodeText | None = Field(None, alias="json", description="A JSON schema, as an object or as text.")
    regex: UnicodeText | None = Field(None, description="A regular expression that the whole answer matches.")
    choice: Annotated[list[Annotated[UnicodeText, Field(min_length=1)]], Field(max_length=MAX_CHOICES)] | None = Field(
        None, description="The answer is one of these."
    )
    grammar: UnicodeText | None = Field(None, description="A grammar in Lark's notation, or in GBNF.")
    json_object: bool | None = Field(None, description="The answer is any JSON object.")
