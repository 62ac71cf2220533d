"""The list of error codes is whole: nothing else is raised, nothing in it is never raised, and both documents say the same."""

from pathlib import Path
from typing import Any

import pytest

from tests.contract.running import fake_config
from tests.vlm_server.error_scan import ROOT, Module, Raised, raised_codes
from vision.image import MediaError
from vlm_server.app import create_app
from vlm_server.docs import openapi_schema
from vlm_server.error_codes import ERROR_CODES, ORDER, page
from vlm_server.errors import _CODES, RETRY_AFTER_S, ApiError, to_api_error

INTERNAL = {"processor_not_loaded"}  # what a worker says to its pool, which says something else to clients
OF_FRAMEWORKS = {("invalid_request", 400)}  # raised by FastAPI and Starlette


@pytest.fixture(scope="module")
def raised() -> list[Raised]:
    return [found for found in raised_codes() if found.code not in INTERNAL]


def test_every_code_that_is_raised_is_listed_with_its_status(raised: list[Raised]) -> None:
    unlisted = [found for found in raised if found.code not in ERROR_CODES or found.status not in (None, *ERROR_CODES[found.code].statuses)]

    shown = "\n".join(f"{found.place}: {found.code} {found.status}" for found in unlisted)
    assert not unlisted, f"add to vlm_server/error_codes.py, and write docs/errors.md with python -m vlm_server.error_codes:\n{shown}"


def test_every_listed_code_and_status_is_raised(raised: list[Raised]) -> None:
    listed = {(code.code, status) for code in ERROR_CODES.values() for status in code.statuses}
    made = {(found.code, found.status) for found in raised} | {(code, status) for status, code in _CODES.items()} | OF_FRAMEWORKS

    assert sorted(listed - made) == []


def test_an_error_of_another_code_cannot_be_made() -> None:
    with pytest.raises(AssertionError, match="no_such_code"):
        ApiError(400, "no_such_code", "wrong")
    with pytest.raises(AssertionError, match="a_decoders_own"):
        to_api_error(MediaError("a_decoders_own", "wrong"))


def test_every_code_has_its_place_its_meaning_and_statuses_that_are_errors() -> None:
    for name, code in ERROR_CODES.items():
        assert name == code.code
        assert name.isidentifier()
        assert name == name.lower()
        assert code.about in ORDER
        assert code.meaning.endswith(".")
        assert all(400 <= status < 600 for status in code.statuses)


def test_the_page_is_the_list() -> None:
    assert (ROOT / "docs" / "errors.md").read_text() == page(), "python -m vlm_server.error_codes > docs/errors.md"


def test_the_document_for_clients_lists_the_codes_in_words_and_forbids_no_new_ones() -> None:
    config = fake_config()
    components: dict[str, Any] = openapi_schema(create_app(config), config)["components"]["schemas"]

    for field in (components["ErrorDetail"]["properties"]["code"], components["ErrorDetails"]["properties"]["error_code"]):
        assert all(f"`{code}`" in field["description"] for code in ERROR_CODES)
        assert "enum" not in field


@pytest.mark.parametrize("status", [429, 503])
def test_who_may_try_again_is_told_when(status: int) -> None:
    assert ApiError(status, "aborted", "wrong").headers["retry-after"] == str(RETRY_AFTER_S)
    assert ApiError(status, "aborted", "wrong", headers={"retry-after": "7"}).headers == {"retry-after": "7"}
    assert to_api_error(MediaError("vision_not_ready", "wait", status=status)).headers["retry-after"] == str(RETRY_AFTER_S)
    assert "retry-after" not in ApiError(400, "invalid_value", "wrong").headers


SOURCE = """
CODES = {404: "of_a_table"}

def chosen(kind):
    return "of_a_function" if kind else "of_its_other_end"

def raises(error, wide):
    name = "of_a_name" if wide else "of_a_narrow_name"
    ApiError(404, name, "…")
    ApiError(error.status, error.code, "…")
    ApiError(error.status, CODES.get(error.status, "of_a_default"), "…")
    bad_request(chosen(wide), "…")
    MediaError("plain", "…", status=503)
    PydanticCustomError("api:prefixed" if wide else "missing", "…")
    Discriminator(wide, custom_error_type="api:of_a_keyword")
"""


def test_the_scan_sees_every_way_to_write_a_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.vlm_server.error_scan.ROOT", tmp_path)
    path = tmp_path / "module.py"
    path.write_text(SOURCE)

    assert {(found.code, found.status) for found in Module(path).raised()} == {
        *(("of_a_name", 404), ("of_a_narrow_name", 404), ("of_a_table", None), ("of_a_default", None)),
        *(("of_a_function", 400), ("of_its_other_end", 400), ("plain", 503)),
        *(("prefixed", 400), ("missing_required_parameter", 400), ("of_a_keyword", 400)),
    }


def test_the_scan_refuses_a_code_that_it_cannot_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.vlm_server.error_scan.ROOT", tmp_path)
    path = tmp_path / "module.py"
    path.write_text('def raises(words):\n    ApiError(400, "".join(words), "…")\n')

    with pytest.raises(AssertionError, match=r"module\.py:2: write the code as a text"):
        list(Module(path).raised())
