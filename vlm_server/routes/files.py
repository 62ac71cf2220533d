"""`/v1/files`: pictures that are sent once, and named by their id in later messages."""

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from vision.image import ImageRef
from vlm_server.auth import tenant_of
from vlm_server.config import ServerConfig
from vlm_server.context import ServerContext, context_of
from vlm_server.errors import bad_request
from vlm_server.field_rules import check_fields
from vlm_server.file_protocol import FORM_BODY, FileForm, FileListQuery
from vlm_server.files import StoredFile
from vlm_server.response_schema import FileDeletedResponse, FileListResponse, FileResponse
from vlm_server.streaming import unless_client_leaves
from vlm_server.uploads import Upload, read_upload

router = APIRouter(tags=["files"])

_BYTES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}


@router.post("/v1/files", response_model=FileResponse, summary="Upload a picture", openapi_extra={"requestBody": FORM_BODY})
async def upload_file(request: Request) -> Response:
    """Then `{"type": "image_url", "image_url": {"file_id": …}}` names it in messages, until it expires or is deleted."""
    context = context_of(request)
    upload = await read_upload(request, limit_bytes=context.config.vision.max_picture_bytes)
    warnings = check_fields(upload.form, strict=context.config.strict_fields)
    ttl_s = _ttl_s(upload.form, context.config)
    file = await unless_client_leaves(request, _kept(context, upload, ttl_s, tenant_of(request.scope)))
    return _json(_as_dict(file), warnings)


@router.get("/v1/files", response_model=FileListResponse, summary="The files of the API key")
async def list_files(request: Request, query: Annotated[FileListQuery, Query()]) -> Response:
    """A page of them, the newest first unless `order` says otherwise; `after` goes on behind a file."""
    context = context_of(request)
    warnings = check_fields(query, strict=context.config.strict_fields)
    files = await context.files.all(tenant_of(request.scope))
    if query.order == "desc":
        files.reverse()
    rest = [file for file in _behind(files, query.after) if query.purpose in (None, file.purpose)]
    page = [_as_dict(file) for file in rest[: query.limit]]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return _json({"object": "list", "data": page, **ends, "has_more": len(rest) > len(page)}, warnings)


@router.get("/v1/files/{file_id}", response_model=FileResponse, summary="What is known of a file")
async def retrieve_file(request: Request, file_id: str) -> Response:
    """The same object as in the list; 404 for other keys' files and for those that have ended."""
    return _json(_as_dict(await context_of(request).files.get(tenant_of(request.scope), file_id)), [])


@router.get("/v1/files/{file_id}/content", summary="The bytes of a file", response_class=Response, responses=_BYTES)
async def file_content(request: Request, file_id: str) -> Response:
    """As they were sent; a browser does not show them in place."""
    content = await context_of(request).files.content(tenant_of(request.scope), file_id)
    headers = {"content-disposition": "attachment", "x-content-type-options": "nosniff"}
    return Response(content, headers=headers, media_type="application/octet-stream")


@router.delete("/v1/files/{file_id}", response_model=FileDeletedResponse, summary="End a file before its time")
async def delete_file(request: Request, file_id: str) -> Response:
    """From now on its id is a 404, and what it took of the key's quota is free."""
    await context_of(request).files.delete(tenant_of(request.scope), file_id)
    return _json({"id": file_id, "object": "file", "deleted": True}, [])


def _ttl_s(form: FileForm, config: ServerConfig) -> float:
    if form.expires_after is None:
        return config.file_ttl_s
    seconds, name = form.expires_after.seconds, "expires_after.seconds"
    if seconds > config.max_file_ttl_s:
        raise bad_request("invalid_value", f"{name}: only 1 … {config.max_file_ttl_s:g} are allowed (--max-file-ttl)", param=name)
    return float(seconds)


async def _kept(context: ServerContext, upload: Upload, ttl_s: float, tenant: str) -> StoredFile:
    """The file, once its header says that it is a picture that the model can be shown."""
    await context.backend.pipeline.check_picture(ImageRef("", "file", data=upload.data), tenant=tenant)
    return await context.files.add(tenant, upload.data, filename=upload.form.file, purpose=upload.form.purpose, ttl_s=ttl_s)


def _behind(files: Sequence[StoredFile], after: str | None) -> Sequence[StoredFile]:
    """The files that follow the one with the id `after`."""
    if after is None:
        return files
    places = [place for place, file in enumerate(files) if file.id == after]
    if not places:
        raise bad_request("invalid_value", "after: this API key has no such file, or has it no more", param="after")
    return files[places[0] + 1 :]


def _as_dict(file: StoredFile) -> dict[str, Any]:
    """OpenAI's object."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": int(file.created_s),
        "expires_at": int(file.expires_s),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }


def _json(content: dict[str, Any], warnings: list[str]) -> Response:
    return Response(msgspec.json.encode(content | ({"warnings": warnings} if warnings else {})), media_type="application/json")
