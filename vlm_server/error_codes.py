"""All codes that an error of the API can have: what `error.code` may be, with which statuses, and what it means.

The one list: an ApiError of another code cannot be made, and a test holds every line that raises one against it. `python -m
vlm_server.error_codes` writes docs/errors.md. Knows nothing of how errors are raised or answered.
"""

from dataclasses import dataclass

ORDER = ("The request", "Pictures", "Files", "Sessions and responses", "Keys and quotas", "The server")


@dataclass(frozen=True, slots=True)
class ErrorCode:
    """A code stays what it is once it was released: clients compare it."""

    code: str
    statuses: tuple[int, ...]
    about: str  # one of ORDER
    meaning: str


def _codes(about: str, *rows: tuple[str, tuple[int, ...], str]) -> dict[str, ErrorCode]:
    return {code: ErrorCode(code, statuses, about, meaning) for code, statuses, meaning in rows}


ERROR_CODES: dict[str, ErrorCode] = {
    **_codes(
        "The request",
        ("invalid_value", (400,), "A field holds what is not allowed; the message says what is."),
        ("missing_required_parameter", (400,), "A field is needed and was left out."),
        ("unsupported_parameter", (400,), "A field that some API documents and this server does not support."),
        ("unknown_parameter", (400,), "With `--strict-fields`: a field that no API documents."),
        ("unsupported_content_type", (400,), "A part of a kind that is not supported here, such as audio, video or a document."),
        ("unsupported_role", (400,), "A message of a role that is not supported."),
        ("unsupported_tool", (400,), "A tool that is no function, such as one that runs on another company's servers."),
        ("unsupported_item", (400,), "An item of a kind that `/v1/responses` does not support here."),
        ("duplicate_item", (400,), "An item that is in the conversation already."),
        ("tools_not_supported", (400,), "The served model cannot be given tools, or its calls cannot be read; the message says which."),
        ("thread_unsupported_request", (400,), "Anthropic's `thread`: send the whole conversation without it."),
        (
            "grammar_too_complex",
            (400,),
            "To follow the schema or grammar takes more than is allowed, as is seen while the answer is written.",
        ),
        ("context_length_exceeded", (400,), "Prompt and answer, or one picture, are longer than the model's window. Send less."),
        ("prompt_too_long", (400,), "A text of more characters than `--max-prompt-characters`."),
        ("too_many_messages", (400,), "More messages than `--max-messages`, those that the server kept included."),
        ("invalid_json", (400,), "The body is no JSON."),
        ("json_too_deep", (400,), "Lists and objects in the body in more levels than `--max-json-depth`."),
        (
            "json_too_large",
            (400,),
            "More values in the body than `--max-json-values`, or lists and objects than `--max-json-containers`.",
        ),
        ("invalid_content_type", (400,), "The header `Content-Type` is missing, or another one than the route reads."),
        ("invalid_request", (400,), "The request cannot be read as HTTP, JSON or a form."),
        ("request_too_large", (413,), "The body has more bytes than `--max-body-bytes`."),
        ("unsupported_media_type", (415,), "The body is of a type that the route does not read."),
        ("model_not_found", (404,), "This server has no model of that name; `GET /v1/models` lists those that it has."),
        ("unsupported_model", (400,), "The served model has not what this route needs."),
        ("not_found", (404,), "There is no such path."),
        ("method_not_allowed", (405,), "The path is not for this method; the header `Allow` lists those that it is for."),
        ("not_allowed", (400,), "The server was started without the flag that allows this."),
        ("not_enabled", (501,), "The server was started without the flag that this route needs."),
        ("unknown_session", (400,), "No request runs under this `session_id`, so that there is none to abort."),
    ),
    **_codes(
        "Pictures",
        ("url_invalid", (400,), "The picture's URL, or what a `data:` URL holds, cannot be read."),
        ("url_blocked", (400,), "The picture's URL leads, by itself or by a redirect, to where this server does not fetch from."),
        ("image_fetch_failed", (400,), "The picture's server could not be reached, answered with an error, or broke off."),
        ("image_fetch_timeout", (400,), "The picture's server took too long. The same request may succeed later."),
        (
            "image_too_large",
            (400,),
            "Too many bytes or pixels: of one picture (`--max-picture-bytes`, `--max-picture-pixels`), or of all pictures of a request "
            "(`--max-request-picture-bytes`, `--max-request-pixels`).",
        ),
        ("too_many_images", (400,), "More pictures than `--max-pictures`, those of earlier turns included."),
        ("image_decode_failed", (400, 503), "No JPEG, PNG, GIF, WebP, AVIF, BMP or TIFF, or a damaged one, or one that takes too long."),
        (
            "image_preprocess_failed",
            (400, 500, 503),
            "The model's own image processor does not take the picture (400), failed at it (500), or broke down (503: try again).",
        ),
        ("template_unavailable", (503,), "The process that renders chat templates was lost twice in a row; try again."),
        ("grammar_unavailable", (503,), "The processes that read schemas and grammars were lost; try again."),
        ("vision_not_ready", (503,), "Pictures cannot be processed now; try again."),
        (
            "server_busy",
            (503,),
            "Other requests hold the memory or the file descriptors that this one needs; try again after `Retry-After`.",
        ),
    ),
    **_codes(
        "Files",
        ("file_not_found", (404,), "This API key has no such file: never, not any more, or it is another key's."),
        (
            "file_quota_exceeded",
            (413,),
            "The key's files are as many, or as large, as `--max-files` and `--max-file-bytes-per-key` allow.",
        ),
    ),
    **_codes(
        "Sessions and responses",
        ("session_busy", (409,), "Another turn of the session is under way; try again after `Retry-After`."),
        ("response_not_found", (404,), "This API key has no such response: never, not any more, or it is another key's."),
        ("previous_response_not_found", (404,), "The same of the response that `previous_response_id` names."),
        ("conversation_too_large", (400,), "The items are larger than what is kept of a response (`--max-session-bytes`)."),
        ("not_cancellable", (400,), "Only responses that run in the background could be cancelled, and none does."),
        (
            "record_unreadable",
            (409,),
            "The session or response was kept by another version of this server, or lost a picture. End the session, or go on without it.",
        ),
        (
            "session_store_full",
            (507,),
            "The disk, or Redis's memory, has no room for what was to be kept (deleting works), or the temporary folder for an upload.",
        ),
        (
            "session_store_unavailable",
            (503,),
            "What the server keeps cannot be read or written now; try again after `Retry-After`.",
        ),
    ),
    **_codes(
        "Keys and quotas",
        ("invalid_api_key", (401,), "The request brings none of the server's API keys."),
        ("quota_exceeded", (429,), "The key's requests, tokens or megapixels of this minute are used up; try again after `Retry-After`."),
    ),
    **_codes(
        "The server",
        (
            "queue_full",
            (429,),
            "Too many requests wait, or too many pictures are on their way to the engine; try again after `Retry-After`.",
        ),
        ("answer_not_read", (503,), "The client took too little of its answer for too long, so that it was given up."),
        ("engine_unavailable", (503,), "The engine is starting, or it ended and starts again; try again after `Retry-After`."),
        ("engine_error", (500,), "The engine failed at this request."),
        ("aborted", (503,), "The server ended the request before it was answered."),
        ("client_closed_request", (499,), "The client closed its connection; only the log shows it."),
        ("internal_error", (500,), "The server failed; its log has the reason under the request's `X-Request-Id`."),
    ),
}

# For `openapi.json`. An enum would have generated clients fail at the first new code.
DESCRIPTION = f"A stable string, one of {', '.join(f'`{code}`' for code in ERROR_CODES)}; new ones may come."

_HEAD = """# Errors

Every error is JSON with a stable `code`. OpenAI's and LMDeploy's clients find it in `error.code`, beside the `message` and `param`, the
path of the field that is wrong, as `messages[0].content[1].image_url`. On Anthropic's routes it is `error.details.error_code`, with
`param` beside it. An error in the middle of a stream is an event of the same content; on `/v1/responses` it is `response.failed`, whose
`error.code` is one of OpenAI's three and whose `error.type` is the code below. A 429 or 503 says in `Retry-After` after how many seconds
another try may succeed.

Where the shape of a body is wrong in several places, the error is about the first one and `detail` lists them.

Codes stay what they are; new ones may come. This page is written by `python -m vlm_server.error_codes`.
"""


def page() -> str:
    """docs/errors.md."""
    return "\n".join([_HEAD, *map(_section, ORDER)])


def _section(about: str) -> str:
    codes = [code for code in ERROR_CODES.values() if code.about == about]
    rows = [f"| `{code.code}` | {', '.join(map(str, code.statuses))} | {code.meaning} |" for code in codes]
    return "\n".join([f"## {about}", "", "| code | status | meaning |", "|---|---|---|", *rows, ""])


if __name__ == "__main__":
    print(page(), end="")
