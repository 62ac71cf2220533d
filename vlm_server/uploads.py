"""A multipart form with one file, read while it arrives and given up as soon as it is too large.

What is longer than a megabyte waits in a temporary file that nobody else sees. Knows nothing of what the file holds.
"""

import errno
import logging
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from vision.image import MediaError
from vlm_server.errors import FULL_RETRY_AFTER_S, ApiError, bad_request, validation_error
from vlm_server.file_protocol import FileForm

logger = logging.getLogger(__name__)

FORM_BYTES = 64 << 10  # of a body beside its file: the other fields, headers, boundaries
MAX_FIELDS = 16
MAX_FIELD_BYTES = 4 << 10
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT})  # ENOENT: there is no such folder


@dataclass(frozen=True, slots=True)
class Upload:
    form: FileForm
    data: bytes


async def read_upload(request: Request, *, limit_bytes: int) -> Upload:
    """The form, its file of at most `limit_bytes`.

    Raises MediaError for a larger one; ApiError for a wrong form, a client that left, and a temporary folder that takes nothing.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raise bad_request("invalid_content_type", "the request needs the header Content-Type: multipart/form-data with a boundary")
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > limit_bytes + FORM_BYTES:
        raise _too_large(limit_bytes)
    limited = _limited(request, limit_bytes)
    try:
        async with limited.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES) as form:
            return Upload(_checked(form), await _file_of(form, limit_bytes))
    except ClientDisconnect:
        raise ApiError(499, "client_closed_request", "the client closed its connection") from None
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        logger.error("an upload cannot be written to the temporary folder: %s", error)
        raise _no_room() from error


def _limited(request: Request, limit_bytes: int) -> Request:
    """The same request, whose body must not have more bytes than a form with a file of `limit_bytes`."""
    num_bytes = 0

    async def receive() -> Message:
        nonlocal num_bytes
        message = await request.receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > limit_bytes + FORM_BYTES:
            raise _too_large(limit_bytes)
        return message

    return Request(request.scope, receive)


def _checked(form: FormData) -> FileForm:
    """Raises ApiError 400, which names the first field that is wrong."""
    try:
        return FileForm.model_validate(_nested(form))
    except ValidationError as error:
        errors = [{**found, "loc": ("form", *found["loc"])} for found in error.errors()]
        raise validation_error(errors, is_json=True) from None


def _nested(form: FormData) -> dict[str, Any]:
    """`a[b]=c` as `{"a": {"b": c}}`; of files their names."""
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        _require_text(name)
        outer, bracket, inner = name.partition("[")
        is_nested = bool(bracket) and inner.endswith("]") and isinstance(fields.get(outer, {}), dict)
        place = fields.setdefault(outer, {}) if is_nested else fields
        key = inner[:-1] if is_nested else name
        if key in place:
            raise bad_request("invalid_value", f"{name}: given twice; once is allowed", param=name)
        place[key] = (value.filename or "") if isinstance(value, UploadFile) else value
    return fields


def _require_text(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:  # the form states a strange charset
        raise bad_request("invalid_value", "the name of a field is not Unicode text") from None


async def _file_of(form: FormData, limit_bytes: int) -> bytes:
    file = form["file"]
    if not isinstance(file, UploadFile):
        raise bad_request("invalid_value", "file: it must be a file, with a filename in its Content-Disposition", param="file")
    data = await file.read()
    if len(data) > limit_bytes:
        raise _too_large(limit_bytes)
    return data


def _no_room() -> ApiError:
    message = "file: the server's temporary folder, where an upload of more than 1 MiB waits, is full or cannot be written; try again later"
    return ApiError(507, "session_store_full", message, param="file", headers={"retry-after": str(FULL_RETRY_AFTER_S)})


def _too_large(limit_bytes: int) -> MediaError:
    return MediaError("image_too_large", f"the picture has more than the allowed {limit_bytes} bytes (--max-picture-bytes)", param="file")
