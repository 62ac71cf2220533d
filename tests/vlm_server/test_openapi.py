"""`openapi.json`: the rules that every route's part of it keeps, whoever adds it, and the names that clients know."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from fastapi import FastAPI

from tests.contract.running import MODEL, RunningServer, fake_config, running_server
from vlm_server.app import create_app
from vlm_server.client_schemas import COMPONENTS, MEANINGS, NAMES, fit_for_clients
from vlm_server.config import ServerConfig
from vlm_server.docs import openapi_schema
from vlm_server.response_schema import HTTPValidationError

Schema = dict[str, Any]

LMDEPLOYS_MODELS = {"ChatCompletionRequest", "EmbeddingsRequest", "GenerateRequest", "HTTPValidationError", "ValidationError"}
LMDEPLOYS_UNIONS = {"Input", "LocationInner", "Messages", "Prompt"}
OPERATIONS = {
    ("/v1/chat/completions", "post"): "chat_completions_v1",
    ("/v1/chat/interactive", "post"): "chat_interactive_v1",
    ("/v1/completions", "post"): "completions_v1",
    ("/v1/embeddings", "post"): "embeddings_v1",
    ("/v1/models", "get"): "list_models_v1",
    ("/v1/models/{model_id}", "get"): "retrieve_model_v1",
    ("/health", "get"): "health",
}
NULL = {"type": "null"}


@pytest.fixture(scope="module")
def document() -> Schema:
    config = fake_config(api_keys=("a-key",))
    return openapi_schema(create_app(config), config)


def operations(document: Schema) -> Iterator[tuple[str, Schema]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method} {path}", operation


def schemas(document: Schema) -> Iterator[tuple[str, Schema]]:
    """(place, schema) of every schema but the components themselves."""
    for name, component in document["components"]["schemas"].items():
        yield from parts(component, name)
    for name, operation in operations(document):
        for parameter in operation.get("parameters", ()):
            yield f"{name} {parameter['name']}", parameter["schema"]
            yield from parts(parameter["schema"], f"{name} {parameter['name']}")


def parts(schema: Schema, place: str) -> Iterator[tuple[str, Schema]]:
    inner = [(f"{place}.{name}", value) for name, value in schema.get("properties", {}).items()]
    inner += [(f"{place}|{number}", value) for key in ("anyOf", "oneOf") for number, value in enumerate(schema.get(key, ()))]
    inner += [(f"{place}[]", schema[key]) for key in ("items", "additionalProperties") if isinstance(schema.get(key), dict)]
    for inner_place, value in inner:
        yield inner_place, value
        yield from parts(value, inner_place)


def test_every_operation_has_a_name_of_its_own_and_says_what_it_does(document: Schema) -> None:
    names = [operation["operationId"] for _, operation in operations(document)]

    assert len(set(names)) == len(names)
    assert all(name.isidentifier() and name.islower() for name in names)
    for place, operation in operations(document):
        assert operation.get("summary"), place
        assert operation.get("description"), place  # the handler's docstring
        assert operation.get("x-group"), place  # its router's tag, by which the page sorts it
        assert "tags" not in operation, place  # one tag, and the operation is no more in DefaultApi


def test_the_operations_that_clients_know_keep_their_names(document: Schema) -> None:
    assert {place: document["paths"][place[0]][place[1]]["operationId"] for place in OPERATIONS} == OPERATIONS


def test_every_answer_and_every_error_has_a_type(document: Schema) -> None:
    for place, operation in operations(document):
        for status, response in operation["responses"].items():
            assert response["description"], (place, status)
            for media_type, content in response.get("content", {}).items():
                is_json = media_type == "application/json"
                assert ("$ref" in content["schema"]) if is_json else content["schema"].get("type") == "string", (place, status)
            assert status < "400" or "application/json" in response["content"], (place, status)
        assert "422" not in operation["responses"], place
        assert ("401" in operation["responses"]) == (operation.get("security") != []), place
        if "requestBody" in operation:
            assert {"400", "413"} <= set(operation["responses"]), place


def test_every_field_has_a_type_and_a_description(document: Schema) -> None:
    lacking = []
    for place, schema in schemas(document):
        is_typed = schema.get("type") or schema.get("$ref") or schema.get("anyOf") or schema.get("oneOf")
        is_field = not place.endswith("[]") and place.rpartition("|")[2] == place
        if not is_typed or (is_field and "." in place and not schema.get("description")):
            lacking.append(place)

    assert lacking == [], f"give them Field(description=…), or {MEANINGS.keys()} a meaning"


def test_no_union_is_nameless_and_no_field_is_always_null(document: Schema) -> None:
    for place, schema in schemas(document):
        members = schema.get("anyOf", []) + schema.get("oneOf", [])
        assert len([member for member in members if member != NULL]) <= 1, place
        assert schema.get("type") != "null" or "|" in place, place
        assert "const" not in schema, place


def test_the_models_that_clients_know_are_there_and_every_reference_leads_somewhere(document: Schema) -> None:
    components = document["components"]["schemas"]
    references = {schema["$ref"].removeprefix(COMPONENTS) for _, schema in schemas(document) if "$ref" in schema}

    assert set(components) >= LMDEPLOYS_MODELS | LMDEPLOYS_UNIONS | set(NAMES.values())
    assert references <= set(components)
    assert all(name.isidentifier() and "__" not in name for name in components)  # else two models have one name
    assert components["LocationInner"]["anyOf"] == [{"type": "string"}, {"type": "integer"}]


def test_every_body_has_examples_and_the_server_answers_them(document: Schema, server: RunningServer) -> None:
    for place, operation in operations(document):
        if "200" not in operation["responses"] or "application/json" not in operation.get("requestBody", {}).get("content", {}):
            continue
        examples = operation["requestBody"]["content"]["application/json"]["examples"]
        for name, example in examples.items():
            response = requests.post(server.url + place.partition(" ")[2], json=example["value"], headers=headers_of(operation), timeout=10)
            expected = 501 if "501" in operation["responses"] else 200  # 501: this server was started without the route's flag
            assert response.status_code == expected, (place, name, response.text)


def headers_of(operation: Schema) -> dict[str, str]:
    """The first example of each header that the operation requires."""
    required = [field for field in operation.get("parameters", ()) if field["in"] == "header" and field["required"]]
    return {field["name"]: next(iter(field["examples"].values()))["value"] for field in required}


def test_a_wrong_body_is_answered_with_all_that_is_wrong_with_it(server: RunningServer) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "text"}]}], "top_p": 2, "n": "x"}

    answer = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=10).json()

    detail = HTTPValidationError.model_validate(answer).detail
    assert detail is not None
    assert [error.loc for error in detail] == [["body", "top_p"], ["body", "n"], ["body", "messages", 0, "content", 0, "text"]]
    assert answer["error"]["param"] == "top_p"
    assert answer["detail"][0] == {"loc": ["body", "top_p"], "msg": "Input should be less than or equal to 1", "type": "less_than_equal"}


def test_no_more_than_32_errors_are_told(server: RunningServer) -> None:
    body = {"model": MODEL, "messages": [{}] * 100}

    answer = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=10).json()

    assert len(answer["detail"]) == 32


def fit(**components: Schema) -> Schema:
    document = {"components": {"schemas": components}, "paths": {}}
    fit_for_clients(document)
    return document["components"]["schemas"]


def of(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties}


TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}


def test_a_union_is_named_after_its_field_and_null_stays_outside() -> None:
    union = {"anyOf": [{"oneOf": [TEXT, {"type": "array", "items": NUMBER}]}, NULL], "title": "Some Text"}

    components = fit(Thing=of(some_text=union))

    assert components["Thing"]["properties"]["some_text"] == {"anyOf": [{"$ref": COMPONENTS + "ThingSomeText"}, NULL]}
    assert components["ThingSomeText"]["oneOf"] == [TEXT, {"type": "array", "items": NUMBER}]


def test_equal_unions_share_a_known_name_whichever_comes_first() -> None:
    union = {"anyOf": [TEXT, FLAG]}

    components = fit(A=of(stop=union), ChatCompletionRequest=of(stop=union), B=of(stop={"anyOf": [TEXT, NUMBER]}))

    assert components["A"]["properties"]["stop"] == {"$ref": COMPONENTS + "Stop"}
    assert components["B"]["properties"]["stop"] == {"$ref": COMPONENTS + "BStop"}


def test_a_union_takes_no_models_name() -> None:
    components = fit(A=of(b={"anyOf": [TEXT, NUMBER]}), AB=of())

    assert components["A"]["properties"]["b"] == {"$ref": COMPONENTS + "ABUnion"}
    assert components["AB"] == of()


def test_whole_numbers_have_whole_bounds_and_64_bits_where_32_are_too_few() -> None:
    small = {"type": "integer", "exclusiveMaximum": 2.0**31, "minimum": -1.0}
    large = {"type": "integer", "exclusiveMaximum": 2.0**63, "minimum": -(2.0**63)}

    components = fit(A=of(small=small, large=large, created=NUMBER))

    properties = components["A"]["properties"]
    assert properties["small"] == {"type": "integer", "minimum": -1, "maximum": 2**31 - 1}
    assert properties["large"] == {"type": "integer", "format": "int64", "minimum": -(2**63), "maximum": 2**63 - 1}
    assert properties["created"]["format"] == "int64"


def test_objects_that_differ_in_their_type_are_told_apart_by_it() -> None:
    first, second = (of(type={"type": "string", "const": name}) for name in ("one", "two"))

    components = fit(A=of(part={"oneOf": [{"$ref": COMPONENTS + "First"}, {"$ref": COMPONENTS + "Second"}]}), First=first, Second=second)

    mapping = {"one": COMPONENTS + "First", "two": COMPONENTS + "Second"}
    assert components["APart"]["discriminator"] == {"propertyName": "type", "mapping": mapping}
    assert components["First"]["properties"]["type"]["enum"] == ["one"]


def test_the_document_is_built_once_however_many_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[FastAPI] = []

    def build(app: FastAPI, config: ServerConfig) -> Schema:
        built.append(app)
        return {"openapi": "3.1.0"}

    monkeypatch.setattr("vlm_server.docs.openapi_schema", build)
    with running_server() as server, ThreadPoolExecutor(5) as threads:
        answers = list(threads.map(lambda _: requests.get(f"{server.url}/openapi.json", timeout=10).json(), range(5)))

    assert answers == [{"openapi": "3.1.0"}] * 5
    assert len(built) == 1


def test_the_swagger_page_runs_its_own_scripts_alone_and_in_no_frame(server: RunningServer) -> None:
    """Its origin's storage may hold a key."""
    headers = requests.get(server.url, timeout=10).headers

    policy = dict(directive.partition(" ")[::2] for directive in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert headers["x-content-type-options"] == "nosniff"
