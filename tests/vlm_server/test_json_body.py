import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_server.config import RequestLimits
from vlm_server.errors import ApiError
from vlm_server.json_body import read_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=30,
)


def depth_of(value: Any) -> int:
    if not isinstance(value, list | dict):
        return 0
    return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)


def num_values(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(num_values, items))


def num_containers(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, list | dict) + sum(map(num_containers, items))


def refusal(body: bytes, **limits: int) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read_json(body, RequestLimits(**limits))  # type: ignore[arg-type]
    return caught.value


@given(JSON)
def test_a_value_within_the_limits_is_read_as_it_is_and_one_level_more_is_refused(value: Any) -> None:
    body, depth = json.dumps(value).encode(), depth_of(value)

    assert read_json(body, RequestLimits(max_json_depth=max(1, depth))) == value
    if depth > 1:
        assert refusal(body, max_json_depth=depth - 1).code == "json_too_deep"


@given(JSON)
def test_more_values_than_are_allowed_are_never_read(value: Any) -> None:
    body, count = json.dumps(value, separators=(",", ":")).encode(), num_values(value)

    if count > 1 and len(body) > count - 1:
        assert refusal(body, max_json_values=count - 1).code == "json_too_large"


@given(JSON)
def test_as_many_lists_and_objects_as_are_allowed_are_taken(value: Any) -> None:
    body, count = json.dumps(value).encode(), num_containers(value)

    assert read_json(body, RequestLimits(max_json_containers=max(1, count))) == value
    if count > 1:
        assert refusal(body, max_json_containers=count - 1).code == "json_too_large"


def test_the_field_that_is_too_deep_is_named() -> None:
    error = refusal(b'{"model": "m", "tools": [[[[]]]], "other": []}', max_json_depth=4)

    assert error.param == "tools"
    assert error.message == "tools: more than 4 levels of lists and objects (--max-json-depth)"


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 200 + b"]" * 200])
def test_a_thousand_levels_end_nothing_but_their_request(body: bytes) -> None:
    assert refusal(body).code == "json_too_deep"


def test_a_field_whose_name_is_no_name_is_not_repeated() -> None:
    strange = b'{"\\ud800": [[]]}', b'{"' + b"a" * 1000 + b'": [[]]}'

    assert [refusal(body, max_json_depth=2).param for body in strange] == [None, None]


def test_a_picture_in_base64_is_one_value() -> None:
    body = json.dumps({"image": "A" * 10_000}).encode()

    assert read_json(body, RequestLimits(max_json_values=3))["image"] == "A" * 10_000


def test_a_body_that_is_nothing_but_values_is_counted_without_being_read() -> None:
    assert refusal(b"[" + b"{}," * 2_000_000 + b"{}]").code == "json_too_large"


@pytest.mark.parametrize("body", [b'{"a": "\xff"}', b"9" * 5000, b"\xff\xfe{"])
def test_what_is_no_json_in_utf8_is_said_to_be_none(body: bytes) -> None:
    assert refusal(body).code == "invalid_json"


def test_a_mistake_has_its_place() -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        read_json(b'{"a": x}', RequestLimits())

    assert caught.value.pos == 6
