"""A picture server on loopback whose every page is a test's own."""

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from tests.vision.pictures import png

Page = Callable[[web.Request], Awaitable[web.StreamResponse]]


class PictureServer:
    """`/picture` is a picture; other paths are what `pages` says. Notes every request."""

    def __init__(self) -> None:
        self.requests: list[web.Request] = []
        self.pages: dict[str, Page] = {"/picture": picture}
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)

    async def open(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()

    async def close(self) -> None:
        await self._runner.cleanup()

    @property
    def port(self) -> int:
        return int(self._runner.addresses[0][1])

    def url(self, path: str = "/picture", *, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        return await self.pages[request.path](request)


async def picture(request: web.Request) -> web.StreamResponse:
    return web.Response(body=png())


class Gate:
    """A page that waits until a test opens it; knows how many clients left before, and how many were there at once."""

    def __init__(self, body: bytes) -> None:
        self.is_open = asyncio.Event()
        self.num_left = 0
        self.num_waiting = 0
        self.max_waiting = 0
        self._body = body

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        self.num_waiting += 1
        self.max_waiting = max(self.max_waiting, self.num_waiting)
        try:
            await self.is_open.wait()
            await asyncio.sleep(0)  # lets those who were waiting for a turn come, were they let in too early
        except asyncio.CancelledError:
            self.num_left += 1
            raise
        finally:
            self.num_waiting -= 1
        return web.Response(body=self._body)


def redirect_to(location: str) -> Page:
    async def page(request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": location})

    return page


def body(data: bytes, **headers: str) -> Page:
    async def page(request: web.Request) -> web.StreamResponse:
        return web.Response(body=data, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return page


def in_turn(*responses: web.Response) -> Page:
    """Each answer once."""
    left = list(responses)

    async def page(request: web.Request) -> web.StreamResponse:
        return left.pop(0)

    return page
