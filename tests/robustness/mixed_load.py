"""Everything that clients do with a server, mixed: chats, streams, pictures of all formats, sessions, files, errors, clients that leave.

A seed decides the order and all contents. Says what was answered; knows nothing of memory or of time.
"""

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from tests.robustness.mutated_pictures import mutated, pictures
from tests.server_process import data_url
from tests.vision.pictures import png

MODEL = "vlm-demo"
_WORDS = ["river", "bridge", "stone", "paper", "engine", "window", "garden", "letter", "cloud", "orange"]


@dataclass
class Load:
    """Chooses and sends requests. `answers`: how often each kind was answered with what."""

    session: aiohttp.ClientSession
    origin: str  # a picture server: /picture/N is the picture number N, /never does not answer
    seed: int = 0
    picture_px: int = 256
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    num_sent: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._small = list(pictures().values())
        self._damaged = mutated(self.seed)
        self._kinds: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self.text, 4),
            (self.stream, 4),
            (self.new_picture, 6),
            (self.every_format, 4),
            (self.fetched_picture, 4),
            (self.damaged_picture, 2),
            (self.leaves_a_stream, 3),
            (self.leaves_a_fetch, 2),
            (self.turn, 3),
            (self.file, 2),
            (self.response, 2),
            (self.message, 2),
            (self.other_routes, 3),
            (self.guided, 1),
            (self.wrong, 3),
        ]

    async def one(self) -> None:
        """One request, or several that belong together, of a kind that is drawn."""
        kinds, weights = zip(*self._kinds, strict=True)
        kind = self.random.choices(kinds, weights)[0]
        self.num_sent += 1
        try:
            await kind()
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            self.unexpected.append(f"{kind.__name__}: {error!r}")

    async def text(self) -> None:
        await self._post("text", "/v1/chat/completions", self._chat(self._sentence(), n=self.random.choice([1, 1, 3])))

    async def stream(self) -> None:
        await self._post("stream", "/v1/chat/completions", self._chat(self._sentence(), stream=True, logprobs=True, top_logprobs=3))

    async def new_picture(self) -> None:
        data = png(self.picture_px, self.random.randint(8, self.picture_px), seed=self.random.getrandbits(40))
        await self._post("new picture", "/v1/chat/completions", self._with_picture(data_url(data)))

    async def every_format(self) -> None:
        await self._post("format", "/v1/chat/completions", self._with_picture(data_url(self.random.choice(self._small))))

    async def fetched_picture(self) -> None:
        url = f"{self.origin}/picture/{self.random.randrange(2000)}"
        await self._post("fetched", "/v1/chat/completions", self._with_picture(url))

    async def damaged_picture(self) -> None:
        _, data = next(self._damaged)
        await self._post("damaged", "/v1/chat/completions", self._with_picture(data_url(data)), allowed=(200, 400))

    async def leaves_a_stream(self) -> None:
        """After a few pieces, in the middle of an answer that would go on."""
        body = self._chat(self._sentence(), stream=True, max_tokens=400, ignore_eos=True)
        async with self.session.post("/v1/chat/completions", json=body) as response:
            for _ in range(self.random.randint(0, 8)):
                await response.content.readline()
            self._note("left stream", response.status, (200,))
            response.close()

    async def leaves_a_fetch(self) -> None:
        asking = asyncio.create_task(self._post("left", "/v1/chat/completions", self._with_picture(f"{self.origin}/never")))
        await asyncio.sleep(self.random.random() / 2)
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking

    async def turn(self) -> None:
        """Of one of many sessions; now and then one ends."""
        number = self.random.randrange(200)
        content = [{"type": "text", "text": self._sentence()}]
        if self.random.random() < 0.3:
            content.append({"type": "image_url", "image_url": {"url": data_url(self.random.choice(self._small))}})
        body = {"prompt": [{"role": "user", "content": content}], "session_id": number, "interactive_mode": True}
        body |= {"request_output_len": 8, "stream": self.random.random() < 0.5}
        if self.random.random() < 0.2:
            body |= {"prompt": "", "interactive_mode": False, "request_output_len": 0}
        await self._post("turn", "/v1/chat/interactive", body, allowed=(200, 409))

    async def file(self) -> None:
        form = aiohttp.FormData()
        form.add_field("purpose", "vision")
        form.add_field("file", png(64, 64, seed=self.random.getrandbits(40)), filename="picture.png")
        async with self.session.post("/v1/files", data=form) as response:
            answer = await response.json()
            self._note("upload", response.status, (200, 413))
        if response.status == 413:  # the quota is full: what is there is deleted
            async with self.session.get("/v1/files") as response:
                kept = [one["id"] for one in (await response.json())["data"]]
            for file_id in kept:
                await (await self.session.delete(f"/v1/files/{file_id}")).read()
            return
        body = self._chat("")
        body["messages"][0]["content"] = [{"type": "image_url", "image_url": {"file_id": answer["id"]}}]
        await self._post("file", "/v1/chat/completions", body)

    async def response(self) -> None:
        """Two, the second of which goes on from the first."""
        body = {"model": MODEL, "input": self._sentence(), "max_output_tokens": 16}
        first = await self._post("response", "/v1/responses", body)
        await self._post("response", "/v1/responses", {**body, "previous_response_id": first["id"], "stream": True})

    async def message(self) -> None:
        body = {"model": MODEL, "max_tokens": 8, "messages": [{"role": "user", "content": self._sentence()}]}
        headers = {"anthropic-version": "2023-06-01"}
        await self._post("message", "/v1/messages", {**body, "stream": self.random.random() < 0.5}, headers=headers)

    async def other_routes(self) -> None:
        path, body = self.random.choice(
            [
                ("/v1/completions", {"model": MODEL, "prompt": [self._sentence()] * 2, "max_tokens": 8, "echo": True}),
                ("/v1/embeddings", {"model": MODEL, "input": [self._sentence()] * 3}),
                ("/tokenize", {"messages": [{"role": "user", "content": self._sentence()}]}),
                ("/generate", {"prompt": self._sentence(), "max_tokens": 8, "return_logprob": True}),
                ("/get_ppl", {"input": self._sentence()}),
                ("/health", None),
                ("/metrics", None),
                ("/openapi.json", None),
                ("/ui", None),
            ]
        )
        if body is not None:
            await self._post(path, path, body)
            return
        async with self.session.get(path) as response:
            await response.read()
            self._note(path, response.status, (200,))

    async def guided(self) -> None:
        """A schema that nobody asked for before."""
        name = f"{self.random.choice(_WORDS)}_{self.random.randrange(100)}"
        schema = {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name], "additionalProperties": False}
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        await self._post("guided", "/v1/chat/completions", self._chat(self._sentence(), response_format=form, max_tokens=24))

    async def wrong(self) -> None:
        path, body = self.random.choice(
            [
                ("/v1/chat/completions", {"model": MODEL}),
                ("/v1/chat/completions", {"model": "another", "messages": []}),
                ("/v1/chat/completions", self._chat(" ".join(_WORDS * 400))),
                ("/v1/chat/completions", self._with_picture("http://10.0.0.1/picture")),
                ("/v1/chat/completions", self._with_picture(f"{self.origin}/missing")),
                (f"/no/such/page/{self.random.getrandbits(40)}", {}),
                ("/v1/responses", {"model": MODEL, "input": "x", "previous_response_id": "resp_none"}),
            ]
        )
        await self._post("wrong", path, body, allowed=(400, 404))

    def _sentence(self) -> str:
        return " ".join(self.random.choices(_WORDS, k=self.random.randint(3, 30)))

    def _chat(self, text: str, **fields: Any) -> dict[str, Any]:
        return {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 16, **fields}

    def _with_picture(self, url: str) -> dict[str, Any]:
        body = self._chat("", max_tokens=4)
        body["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self._sentence()}]
        return body

    async def _post(
        self, kind: str, path: str, body: dict[str, Any], *, allowed: tuple[int, ...] = (200,), headers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        async with self.session.post(path, json=body, headers=headers) as response:
            text = await response.text()
            self._note(kind, response.status, allowed, text)
        return dict(json.loads(text)) if response.content_type == "application/json" else {}

    def _note(self, kind: str, status: int, allowed: tuple[int, ...], text: str = "") -> None:
        self.answers[kind, status] += 1
        if status not in allowed:
            self.unexpected.append(f"{kind}: {status} {text[:300]}")


@contextlib.asynccontextmanager
async def picture_origin() -> AsyncIterator[str]:
    """Its URL. Pictures may be kept for a minute, and then be asked for again under their ETag."""

    async def picture(request: web.Request) -> web.Response:
        number = request.match_info["number"]
        headers = {"ETag": f'"{number}"', "Cache-Control": "max-age=60"}
        if request.headers.get("If-None-Match") == headers["ETag"]:
            return web.Response(status=304, headers=headers)
        return web.Response(body=png(128, 96, seed=int(number)), headers=headers)

    async def never(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    app = web.Application()
    app.router.add_get("/picture/{number}", picture)
    app.router.add_get("/never", never)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
