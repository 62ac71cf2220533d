"""The chat page at `/ui` and the status page at `/ui/status`: files of this package, under a policy that lets them load and send nothing
elsewhere.

All files are read when the app is made, and each has its exact path: no path of a request reaches the file system, and what is open without
a key is a set of strings. Knows nothing of what the pages do; that is in `ui/chat/` and `ui/status/`.
"""

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from vlm_server.config import ServerConfig
from vlm_server.examples import RED_CIRCLE

PATH = "/ui"
FOLDER = Path(__file__).parent / "ui" / "chat"
STATUS_FOLDER = FOLDER.parent / "status"

_PAGE = "index.html"
# Ours, since the system's table of media types differs from machine to machine, and a module of another type does not run.
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
}
# Whatever a model writes into its answer, the page runs its own files only, and shows and reaches nothing of other hosts.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
_SLASHED = (f"{PATH}/", f"{PATH}/{STATUS_FOLDER.name}/")  # lead to the pages
_HEADERS = {
    "cache-control": "no-cache",  # kept, and asked about by its ETag: a new version of the server is a new page at once
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str


class ChatPage:
    """The page at `/ui` and its files below `/ui/`; the status page too, where the numbers that it shows are."""

    def __init__(self, config: ServerConfig) -> None:
        contents = _contents(FOLDER)
        if config.enable_metrics:
            contents |= {f"{STATUS_FOLDER.name}/{name}": content for name, content in _contents(STATUS_FOLDER).items()}
        contents["limits.json"] = json.dumps(_limits(config)).encode()
        contents["example.png"] = base64.b64decode(RED_CIRCLE.partition(",")[2])
        self._files = {f"{PATH}/{name}".removesuffix(f"/{_PAGE}"): _file(name, content) for name, content in contents.items()}

    @property
    def paths(self) -> frozenset[str]:
        """Every path that is answered."""
        return frozenset({*self._files, *(path for path in _SLASHED if path.removesuffix("/") in self._files)})

    def add_to(self, app: FastAPI) -> None:
        app.add_route(PATH, self._answer, include_in_schema=False)
        app.add_route(PATH + "/{name:path}", self._answer, include_in_schema=False)

    async def _answer(self, request: Request) -> Response:
        path = request.scope["path"]
        if path in _SLASHED and path in self.paths:
            return RedirectResponse(f"../{path.split('/')[-2]}", 308)  # relative: right behind a prefix too
        file = self._files.get(path)
        if file is None:
            raise HTTPException(404)
        headers = {**_HEADERS, "etag": file.etag}
        if file.etag in _tags(request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)


def _contents(folder: Path) -> dict[str, bytes]:
    """By their names below the folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.suffix in _MEDIA_TYPES}


def _limits(config: ServerConfig) -> dict[str, int]:
    """What the page refuses before it sends it. No secrets: it is readable without a key."""
    return {
        "max_picture_bytes": config.vision.max_picture_bytes,
        "max_picture_pixels": config.vision.max_picture_pixels,
        "max_body_bytes": config.max_body_bytes,
    }


def _file(name: str, content: bytes) -> _File:
    return _File(content, _MEDIA_TYPES[Path(name).suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _tags(header: str) -> list[str]:
    return [tag.strip().removeprefix("W/") for tag in header.split(",")]
