"""What `openapi.json` needs so that openapi-generator makes clients of it: each union has a name that stays, and no schema is harder than
what it says.

Works on the document alone and on whatever routes it describes; nothing that is accepted or sent changes. The rules:

- An operation has no tag, so that all of them are methods of `DefaultApi`, as in the clients that LMDeploy's users have; the tags of our
  routes are kept as `x-group`, by which the page at `/` sorts them.
- A union, null left aside, is a component. Its name is that of the model and of the field that have it, but for those in `NAMES`.
- A union of objects that differ by one field says so with a discriminator.
- A field without a description has the one in `MEANINGS`; one that is always null is a text or null.
- A constant is an enum of one value, and whole numbers are bounded by whole numbers, with a format where 32 bits are too few.
"""

import json
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

COMPONENTS = "#/components/schemas/"
# Names that clients know, or that several models share: the place whose union it is → its name. Equal unions elsewhere share it.
NAMES = {
    "ChatCompletionRequest.messages": "Messages",
    "ChatCompletionRequest.response_format": "ResponseFormat",
    "ChatCompletionRequest.stop": "Stop",
    "ChatCompletionRequest.tool_choice": "ToolChoice",
    "ChatMessage.content": "Content",
    "Content[]": "ContentPart",
    "CompletionRequest.prompt": "Prompt",
    "EmbeddingsRequest.input": "Input",
    "NamedJsonSchema.schema": "JsonSchema",
    "ValidationError.loc[]": "LocationInner",
}
# What a field without a description of its own is, wherever it stands.
MEANINGS = {
    "bytes": "Its size in bytes.",
    "cache_creation_input_tokens": "Always 0: filling the prefix cache is not counted.",
    "choices": "The answers.",
    "content": "What it holds: a text, or a list of parts.",
    "created": "When, in seconds since 1970.",
    "created_at": "When, in seconds since 1970.",
    "data": "The objects.",
    "deleted": "Always true.",
    "description": "What it is for, as the model is told.",
    "details": "The error's own code, and the field it is about.",
    "display_name": "The model's id.",
    "error": "What went wrong.",
    "error_code": "A stable string.",
    "file_id": "The id of a file that POST /v1/files was given.",
    "filename": "The file's name, as its client gave it.",
    "finish_reason": "Why the answer ended; null before its end.",
    "first_id": "The id of the first object here.",
    "has_more": "Whether there are more objects behind these.",
    "id": "A name that nothing else has.",
    "index": "Which one, from 0.",
    "input": "What it is called with.",
    "input_tokens": "Tokens of the prompt, those of pictures included.",
    "last_id": "The id of the last object here, behind which one may go on.",
    "lifecycle": "Always null.",
    "logprobs": "Log probabilities, where they are asked for.",
    "max_input_tokens": "Tokens of prompt and answer together.",
    "max_tokens": "New tokens at most.",
    "media_type": "The picture's media type, as in image/png.",
    "message": "What was wrong, and what is allowed.",
    "meta_info": "What the answer cost, and how it ended.",
    "model": "The model's id.",
    "name": "Its name.",
    "object": "What kind of object this is.",
    "output_config": "How the answer is written: with how much effort, and in which form.",
    "output_tokens": "Tokens of the answer so far.",
    "prompt_tokens": "Tokens of the prompt, those of pictures included.",
    "purpose": "What the file is for, as its client said.",
    "request_id": "The request's id, as in the server's log.",
    "role": "Who speaks.",
    "schema": "A JSON schema.",
    "service_tier": "Always standard.",
    "size": "The size to which the processor resizes.",
    "source": "Where the picture is.",
    "status": "Always processed.",
    "stop_details": "Always null.",
    "stop_sequences": "End before any of these strings.",
    "system": "What the model is told before the conversation.",
    "text": "The text.",
    "thinking": "What the model thought.",
    "thinking_tokens": "Tokens of what the model thought.",
    "tool_choice": "Whether a function must be called, and which.",
    "tool_use_id": "The id of the call that this is the result of.",
    "tools": "Functions that the model may call.",
    "top_k": "Keep the k most likely tokens.",
    "top_p": "Keep the most likely tokens that together reach this probability.",
    "ttl": "Without effect: the prefix cache keeps what is used.",
    "type": "What kind of thing this is.",
    "url": "An http, https or data: URL.",
    "usage": "How many tokens were read and written.",
    "warnings": "Fields of the request that have no effect, and pictures that were left out; absent without any.",
}
_INT32, _INT64 = 2**31 - 1, 2**63 - 1
_TIMES = ("created", "_at")  # endings of the names of seconds since 1970, of which 32 bits hold those before 2038
_NULL = {"type": "null"}


def fit_for_clients(document: Schema) -> None:
    """Applies the rules in place."""
    components = document["components"]["schemas"]
    unions = _Unions(components)
    for name in sorted(components, key=_those_with_names_first):
        component = components[name]
        components[name] = unions.named_within(component, name) if _members(component) else _fit(component, name, unions)
    for operations in document["paths"].values():
        for operation in operations.values():
            if tags := operation.pop("tags", None):
                operation["x-group"] = tags[0]
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = _without_null(parameter["schema"])


def _those_with_names_first(name: str) -> tuple[bool, str]:
    """So that equal unions get the known name whatever models there are."""
    return not any(place.startswith(f"{name}.") for place in NAMES), name


class _Unions:
    """Gives unions their names, and equal ones the same where `NAMES` has it."""

    def __init__(self, components: Schema) -> None:
        self._components = components
        self._models = frozenset(components)
        self._shared: dict[str, str] = {}  # by their JSON

    def named(self, schema: Schema, place: str) -> Schema:
        """A reference to the union's component, which is added where it is new; a union with null of something else stays as it is."""
        members, has_null = _flat(schema)
        key = json.dumps([_keyword(schema), members], sort_keys=True)
        name = self._shared.get(key) or NAMES.get(place) or self._free(_pascal(place))
        if name not in self._components:
            if place in NAMES:
                self._shared[key] = name
            self._components[name] = self.named_within(schema, name)
        reference = {"$ref": COMPONENTS + name}
        return {"anyOf": [reference, _NULL]} if has_null else reference

    def _free(self, name: str) -> str:
        return f"{name}Union" if name in self._models else name

    def named_within(self, schema: Schema, name: str) -> Schema:
        """The component: the union's members without null, and what tells them apart."""
        members, _ = _flat(schema)
        fit: Schema = {_keyword(schema): [_fit(member, name, self) for member in members], "title": name}
        if "description" in schema:
            fit["description"] = schema["description"]
        if discriminator := schema.get("discriminator") or self._discriminator(members):
            fit["discriminator"] = discriminator
        return fit

    def _discriminator(self, members: list[Schema]) -> Schema | None:
        references = [member.get("$ref") for member in members]
        types = [self._components.get(str(ref).removeprefix(COMPONENTS), {}).get("properties", {}).get("type", {}) for ref in references]
        values = [kind.get("const") or next(iter(kind.get("enum", ())), None) for kind in types]
        if None in values or len(set(values)) < len(values):
            return None
        return {"propertyName": "type", "mapping": dict(zip(values, references, strict=True))}


def _fit(schema: Any, place: str, unions: _Unions) -> Any:
    """The schema by the rules; `place` is a component's name, or how its parts are reached from there."""
    if not isinstance(schema, dict):
        return schema
    if _members(schema):
        return _fit_union(schema, place, unions)
    fit = _plain(schema, place)
    if "properties" in fit:
        fit["properties"] = {name: _property(name, _fit(value, f"{place}.{name}", unions)) for name, value in fit["properties"].items()}
    if "items" in fit:
        fit["items"] = _fit(fit["items"], f"{place}[]", unions)
    if isinstance(fit.get("additionalProperties"), dict):
        fit["additionalProperties"] = _fit(fit["additionalProperties"], f"{place}{{}}", unions)
    return fit


def _property(name: str, schema: Schema) -> Schema:
    if schema.get("type") == "null":  # generators have no type that is always null
        schema = {key: value for key, value in schema.items() if key != "type"} | {"anyOf": [{"type": "string"}, _NULL]}
    return {"description": MEANINGS[name], **schema} if name in MEANINGS else schema


def _fit_union(schema: Schema, place: str, unions: _Unions) -> Schema:
    about = {key: schema[key] for key in ("description", "default", "examples") if key in schema}
    members, has_null = _flat(schema)
    if len(members) > 1:
        return unions.named(schema, place) | about
    [member] = [_fit(member, place, unions) for member in members]
    return ({"anyOf": [member, _NULL]} if has_null else member) | about


def _members(schema: Schema) -> list[Schema]:
    members: list[Schema] = schema.get("anyOf") or schema.get("oneOf") or []
    return members


def _flat(schema: Schema) -> tuple[list[Schema], bool]:
    """The members of a union and of the unions among them, without null; and whether null was there."""
    found = list(_leaves(schema))
    members = [member for member in found if member != _NULL]
    return members, len(members) < len(found)


def _leaves(schema: Schema) -> Iterator[Schema]:
    for member in _members(schema):
        if _members(member):
            yield from _leaves(member)
        else:
            yield {key: value for key, value in member.items() if key != "title"}


def _keyword(schema: Schema) -> str:
    """`anyOf` where several members may be meant by one value."""
    is_loose = sum(member != _NULL for member in schema.get("anyOf", ())) > 1
    return "anyOf" if is_loose or any(_keyword(member) == "anyOf" for member in _members(schema)) else "oneOf"


def _plain(schema: Schema, place: str) -> Schema:
    """Without the titles that pydantic makes of names, without `const`, and with whole bounds."""
    fit = {key: value for key, value in schema.items() if key != "title" or place == value}
    if "const" in fit:
        fit["enum"] = [fit.pop("const")]
    return _whole(fit, place) if fit.get("type") == "integer" else fit


def _whole(schema: Schema, place: str) -> Schema:
    lowest = _bound(schema.pop("minimum", None), schema.pop("exclusiveMinimum", None), 1)
    highest = _bound(schema.pop("maximum", None), schema.pop("exclusiveMaximum", None), -1)
    bounds = {"minimum": lowest, "maximum": None if highest is None else min(highest, _INT64)}
    is_long = place.endswith(_TIMES) or any(value is not None and abs(value) > _INT32 + 1 for value in bounds.values())
    return schema | {key: value for key, value in bounds.items() if value is not None} | ({"format": "int64"} if is_long else {})


def _bound(inclusive: float | None, exclusive: float | None, step: int) -> int | None:
    if exclusive is not None:
        return int(exclusive) + step
    return None if inclusive is None else int(inclusive)


def _without_null(schema: Schema) -> Schema:
    """Of a parameter, which is a string of its address."""
    members, has_null = _flat(schema)
    if not has_null or len(members) > 1:
        return schema
    return members[0] | {key: schema[key] for key in ("description", "default") if key in schema}


def _pascal(place: str) -> str:
    """`ImagePartImageUrl` of `ImagePart.image_url`, and with `Item` for the items of an array."""
    words = place.replace("[]", "_item").replace("{}", "_value").replace(".", "_").split("_")
    return "".join(word[:1].upper() + word[1:] for word in words)
