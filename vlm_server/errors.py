"""Every error body that the server sends, and which exception becomes which.

The body is OpenAI's `{"error": {...}}` with LMDeploy's flat keys beside it, so that clients of both read it; Anthropic's clients get
theirs. Of routes it knows only which are Anthropic's.
"""

import http
import re
from collections.abc import Mapping, Sequence

import fastapi
import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from engine.request import EngineDeadError, InvalidRequestError, PromptTooLongError, QueueFullError, UnreadError
from vision.budget import BudgetFullError
from vision.image import MediaError
from vlm_server.error_codes import ERROR_CODES
from vlm_server.jinja_process import RendererLostError
from vlm_server.quotas import QuotaExceededError
from vlm_server.sessions.history import SessionBusyError
from vlm_server.sessions.store import StoreError, StoreFullError, UnreadableRecordError

MAX_DETAILS = 32
RETRY_AFTER_S = 2  # an engine that died is back after about as long
_PASSING = (429, 503)  # the same request may succeed later
FULL_RETRY_AFTER_S = 60  # somebody has to make room

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 415: "unsupported_media_type", 503: "server_busy"}


class ApiError(Exception):
    """An answer other than success. `code` is one of `error_codes`, `param` the field's path in the request."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        detail: Sequence[Mapping[str, object]] = (),
    ) -> None:
        assert code in ERROR_CODES, f"{code} is not in vlm_server/error_codes.py"
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = ({"retry-after": str(RETRY_AFTER_S)} if status in _PASSING else {}) | dict(headers or {})
        self.detail = detail  # all that is wrong with a body's shape, as FastAPI's clients read it

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, object]:
        """OpenAI's nested object; beside it LMDeploy's flat keys, where `code` is the status."""
        nested = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        body = {"error": nested, **nested, "code": self.status, "object": "error"}
        return body | ({"detail": list(self.detail)} if self.detail else {})

    def anthropic_body(self, request_id: str | None) -> dict[str, object]:
        """Anthropic's object. `details` is ours in content: its `error_code` is the same as OpenAI's clients get."""
        kind = _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        details = {"error_code": self.code, "param": self.param}
        return {"type": "error", "error": {"type": kind, "message": self.message, "details": details}, "request_id": request_id}

    def response(self, scope: Scope) -> Response:
        """In the words of the API that the request of `scope` speaks."""
        facts = scope.setdefault("request_facts", {})
        facts["error"] = self.code  # for the log and the metrics
        body = self.anthropic_body(facts.get("id")) if speaks_anthropic(scope) else self.body()
        return Response(msgspec.json.encode(body), self.status, self.headers, media_type="application/json")


def speaks_anthropic(scope: Scope) -> bool:
    """Whether a request came to one of Anthropic's routes, or with the header that its clients send to all routes."""
    is_route = scope["path"] == "/v1/messages" or scope["path"].startswith(("/v1/messages/", "/anthropic/"))
    return is_route or any(name == b"anthropic-version" for name, _ in scope["headers"])


class RefusedBodyError(fastapi.HTTPException):
    """An ApiError that is found while a body is read, as the one kind that FastAPI lets through then."""

    def __init__(self, refusal: ApiError) -> None:
        super().__init__(refusal.status, refusal.message)
        self.refusal = refusal


def bad_request(code: str, message: str, *, param: str | None = None) -> ApiError:
    return ApiError(400, code, message, param=param)


def to_api_error(error: Exception, *, param: str | None = None) -> ApiError:
    """What the client is told of an exception. An unknown one is an internal error whose text stays with us.

    param: the field that is named where the exception names none.
    """
    match error:
        case ApiError():
            return error
        case RefusedBodyError():
            return error.refusal
        case MediaError():
            message = f"{error.param}: {error.message}" if error.param else error.message
            headers = {"retry-after": str(error.retry_after_s or RETRY_AFTER_S)} if error.status == 503 else {}
            return ApiError(error.status, error.code, message, param=error.param, headers=headers)
        case BudgetFullError():
            return ApiError(503, "server_busy", str(error), headers={"retry-after": str(error.retry_after_s)})
        case PromptTooLongError():
            return bad_request("context_length_exceeded", str(error), param=param)
        case InvalidRequestError():
            return bad_request("invalid_value", str(error), param=_leading_field(str(error)) or param)
        case QueueFullError():
            return ApiError(429, "queue_full", str(error), headers={"retry-after": str(error.retry_after_s)})
        case QuotaExceededError():
            return ApiError(429, "quota_exceeded", str(error), headers={"retry-after": str(error.retry_after_s)})
        case SessionBusyError():
            return ApiError(409, "session_busy", str(error), param="session_id", headers={"retry-after": str(RETRY_AFTER_S)})
        case RendererLostError():
            message = f"the chat template cannot be rendered now: {error}; try again"
            return ApiError(503, "template_unavailable", message, headers={"retry-after": str(RETRY_AFTER_S)})
        case StoreFullError():
            return ApiError(507, "session_store_full", str(error), headers={"retry-after": str(FULL_RETRY_AFTER_S)})
        case UnreadableRecordError():
            return ApiError(409, "record_unreadable", str(error), param=_leading_field(str(error)))
        case StoreError():
            return ApiError(503, "session_store_unavailable", str(error), headers={"retry-after": str(RETRY_AFTER_S)})
        case UnreadError():
            return ApiError(503, "answer_not_read", str(error))
        case EngineDeadError():
            return ApiError(503, "engine_unavailable", str(error), headers={"retry-after": str(RETRY_AFTER_S)})
        case HTTPException():
            return _from_http(error)
        case _:
            return ApiError(500, "internal_error", "internal error; the server's log has it under this request's X-Request-Id")


def validation_error(errors: Sequence[Mapping[str, object]], *, is_json: bool) -> ApiError:
    """The first of pydantic's errors as a 400 that names the field, with the others in its detail."""
    if not is_json:
        return bad_request("invalid_content_type", "the request needs the header Content-Type: application/json")
    error = errors[0]
    kind, message, location = str(error["type"]), str(error["msg"]), error["loc"]
    assert isinstance(location, tuple)
    if kind == "json_invalid":
        return bad_request("invalid_json", f"the body is not JSON, seen at character {location[-1]}")
    if kind == "extra_forbidden":
        message = "there is no such setting"
    param = field_path(location[1:]) or None
    detail = [_as_fastapi(error) for error in errors[:MAX_DETAILS]]
    return ApiError(400, _code_of(kind), f"{param}: {message}" if param else message, param=param, detail=detail)


def _as_fastapi(error: Mapping[str, object]) -> dict[str, object]:
    """One entry of `detail`, without what the client sent."""
    location = error["loc"]
    assert isinstance(location, tuple)
    loc = [part for part in location if isinstance(part, int) or not part.startswith("<")]
    return {"loc": loc, "msg": error["msg"], "type": error["type"]}


def _code_of(kind: str) -> str:
    """Our own validators raise PydanticCustomError("api:<code>", …)."""
    if kind.startswith("api:"):
        return kind.removeprefix("api:")
    return "missing_required_parameter" if kind == "missing" else "invalid_value"


def field_path(location: Sequence[str | int]) -> str:
    """`messages[0].content[1].image_url` from pydantic's location; the tags of unions are written <so> and are no fields."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<"):
            path += f".{part}" if path else part
    return path


def _leading_field(message: str) -> str | None:
    """The engine's messages begin with `field: `."""
    found = re.match(r"([a-z_][\w.\[\]]*): ", message)
    return found[1] if found else None


def _from_http(error: HTTPException) -> ApiError:
    phrase = http.HTTPStatus(error.status_code).phrase
    message = error.detail if error.detail != phrase else phrase.lower()
    return ApiError(error.status_code, _CODES.get(error.status_code, "invalid_request"), message, headers=error.headers)
