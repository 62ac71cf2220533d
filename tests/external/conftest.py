from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.contract.running import RunningServer, running_server
from tests.external.chat_page import ChatPage, chat_page, chromium


@pytest.fixture(scope="module")
def browser_program() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RunningServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def scripted(shared_server: RunningServer) -> RunningServer:
    """A running server over a scripted engine, scripted anew."""
    shared_server.backend.reset()
    return shared_server


@pytest.fixture
def chat(browser_program: Browser, scripted: RunningServer) -> Iterator[ChatPage]:
    """The page, opened in a wide window."""
    with chat_page(browser_program, scripted.url) as chat:
        chat.open()
        yield chat
