"""The shape of the tools that a request offers, and of its choice among them. Knows nothing of how calls are written or read."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from vlm_server.config import MAX_SCHEMA_CHARACTERS
from vlm_server.message_schema import UnicodeText
from vlm_server.nesting import MAX_DEPTH, is_too_deep

MAX_TOOLS = 128

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


def _is_object_schema(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    """Refuses what cannot describe a JSON object; the schemas of properties are the grammar's to read."""
    if schema is None:
        return None
    properties, required = schema.get("properties", {}), schema.get("required", [])
    has_schemas = isinstance(properties, dict) and all(isinstance(value, dict | bool) for value in properties.values())
    has_names = isinstance(required, list) and all(isinstance(name, str) for name in required)
    for is_right, reason in (
        (not is_too_deep(schema), f"nested in more than {MAX_DEPTH} levels"),
        (schema.get("type", "object") == "object", "arguments are an object: its type must be object"),
        (has_schemas, "properties: not an object of schemas"),
        (has_names, "required: not a list of names"),
    ):
        if not is_right:
            raise PydanticCustomError("api:invalid_value", "no JSON schema of an object: {reason}", {"reason": reason})
    _check_text(schema)
    return schema


def _check_text(schema: dict[str, Any]) -> None:
    try:
        json.dumps(schema, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("api:invalid_value", "not Unicode text: half of a surrogate pair") from None


class FunctionDefinition(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: FunctionName = Field(description="What the model calls it by: letters, digits, _ and -.")
    description: UnicodeText | None = Field(None, description="What it is for, in words for the model.")
    parameters: Annotated[dict[str, Any] | None, AfterValidator(_is_object_schema)] = Field(
        None, description="The JSON schema of the arguments, an object. Default: no arguments."
    )
    strict: bool | None = Field(None, description="The arguments must follow the schema.")

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        return {"type": "object", "properties": {}} if self.parameters is None else {"type": "object", **self.parameters}


class Tool(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: FunctionDefinition = Field(description="What the model is told of the function.")

    def as_dict(self) -> dict[str, Any]:
        """What the client sent, for the chat template."""
        function = self.function.model_dump(exclude_none=True, include=set(FunctionDefinition.model_fields))
        return {"type": self.type, "function": function}


def _check_tools(tools: list[Tool] | None) -> list[Tool] | None:
    names = [tool.function.name for tool in tools or ()]
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise PydanticCustomError("api:invalid_value", "two functions are called {name}", {"name": duplicates[0]})
    size = sum(len(json.dumps(tool.as_dict())) for tool in tools or ())
    if size > MAX_SCHEMA_CHARACTERS:
        message = "{size} characters of JSON, at most {limit} are allowed"
        raise PydanticCustomError("api:invalid_value", message, {"size": size, "limit": MAX_SCHEMA_CHARACTERS})
    return tools


Tools = Annotated[Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None, AfterValidator(_check_tools)]


class FunctionReference(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: FunctionName = Field(description="One of the names in tools.")


class NamedTool(BaseModel):
    """The one function that must be called."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: FunctionReference = Field(description="Which function.")


class AllowedTools(BaseModel):
    model_config = ConfigDict(extra="allow")

    mode: Literal["auto", "required"] = Field(description="auto: one of them may be called; required: one must be.")
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)] = Field(description="Those that are allowed.")


class AllowedToolsChoice(BaseModel):
    """Some of the tools."""

    model_config = ConfigDict(extra="allow")

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools = Field(description="Which, and whether one of them must be called.")


def _choice_kind(value: object) -> str:
    if isinstance(value, dict | NamedTool | AllowedToolsChoice):
        kind = value.get("type") if isinstance(value, dict) else value.type
        return "<allowed_tools>" if kind == "allowed_tools" else "<function>"
    return "<string>"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<string>")]
    | Annotated[NamedTool, Tag("<function>")]
    | Annotated[AllowedToolsChoice, Tag("<allowed_tools>")],
    Discriminator(_choice_kind),
]


def names_in(choice: "str | NamedTool | AllowedToolsChoice | None") -> list[str] | None:
    """The functions that a choice names; None where it names none."""
    if isinstance(choice, NamedTool):
        return [choice.function.name]
    if isinstance(choice, AllowedToolsChoice):
        return [tool.function.name for tool in choice.allowed_tools.tools]
    return None


def forces_a_call(choice: "str | NamedTool | AllowedToolsChoice | None") -> bool:
    return (
        choice == "required"
        or isinstance(choice, NamedTool)
        or (isinstance(choice, AllowedToolsChoice) and choice.allowed_tools.mode == "required")
    )


def may_be_called(tools: list[Tool], choice: "str | NamedTool | AllowedToolsChoice | None") -> list[Tool]:
    """The tools that the choice leaves."""
    names = names_in(choice)
    return [] if choice == "none" else [tool for tool in tools if names is None or tool.function.name in names]
