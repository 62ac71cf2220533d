"""The Swagger page in a real browser without a network: "Try it out" is pressed and answered."""

from pathlib import Path

import pytest

from tests.browser.chromium import Page, open_page
from tests.contract.running import running_server

pytestmark = pytest.mark.external

# Waits for an element; the page builds itself after loading.
FIND = """
const find = async (selector) => {
  for (let tries = 0; tries < 300; tries++) {
    const element = document.querySelector(selector);
    if (element) return element;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  throw new Error(`no ${selector}`);
};
"""
TRY_IT_OUT = """
(async () => {
  %(find)s
  const block = "#operations-%(operation)s";
  (await find(`${block} .opblock-summary-control`)).click();
  (await find(`${block} .try-out__btn`)).click();
  const example = %(example)r;
  if (example) {
    const select = await find(`${block} .examples-select-element`);
    Object.getOwnPropertyDescriptor(HTMLSelectElement.prototype, "value").set.call(select, example);
    select.dispatchEvent(new Event("change", {bubbles: true}));
  }
  const execute = await find(`${block} .execute`);
  execute.click();
  const status = (await find(`${block} .live-responses-table tbody .response-col_status`)).textContent;
  const body = (await find(`${block} .live-responses-table tbody .response-col_description`)).textContent;
  return [status.slice(0, 3), body];
})()
"""

CASES = [
    ("models-list_models_v1", "", "org/tiny-vlm"),
    ("models-retrieve_model_v1", "", "org/tiny-vlm"),
    ("chat-chat_completions_v1", "", "This is a test."),
    ("chat-chat_completions_v1", "image", '"image_tokens": 4'),
    ("chat-chat_completions_v1", "stream", "[DONE]"),
    ("completions-completions_v1", "", "text_completion"),
    ("operation-health", "", "healthy"),
]


@pytest.mark.parametrize(("operation", "example", "expected"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
async def test_try_it_out_is_answered(operation: str, example: str, expected: str, tmp_path: Path) -> None:
    with running_server() as server:
        async with open_page(f"{server.url}/", tmp_path / "profile") as page:
            status, body = await try_it_out(page, operation, example)
            picture = await page.screenshot()

    (tmp_path / "page.png").write_bytes(picture)  # to be looked at
    assert status == "200"
    assert expected in body


async def try_it_out(page: Page, operation: str, example: str) -> tuple[str, str]:
    """Status and body that the page shows after its button was pressed."""
    status, body = await page.evaluate(TRY_IT_OUT % {"find": FIND, "operation": operation, "example": example})
    return status, body
