"""A chat page for any server with OpenAI's chat API, made with gradio: `vlm-server gradio URL`.

gradio is an optional package and is imported here alone, when the page is asked for. Its telemetry is off, nothing is loaded from
elsewhere, and an answer is shown as plain text: it runs no HTML and fetches no picture. gradio itself would clean an answer of scripts
and show the rest as HTML; so answers are escaped on their way to the page, and unescaped on the way back with the history.
"""

import asyncio
import html
import importlib.util
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from vlm_server.chat_client import MAX_PICTURE_BYTES, ChatError, ChatServer, Message, picture_part, text_part, user_message

_FAILED = "failed"  # the id of a bubble that tells of a failure: its turn is not sent again
_KEPT_S = 24 * 3600  # uploaded pictures
_FONTS = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
_STYLE = "button[aria-label=Share] { display: none !important }"  # it would send a picture to gradio's makers
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; worker-src 'self' blob:"
)


class GradioMissingError(Exception):
    def __init__(self) -> None:
        super().__init__("the chat page needs the optional package gradio: pip install 'vlm-server[gradio]', or in a clone: make gradio")


def serve_page(server: ChatServer, *, host: str, port: int) -> None:
    """Blocks until it is stopped by a signal. Raises GradioMissingError; ChatError without models or with a taken port."""
    if importlib.util.find_spec("gradio") is None:
        raise GradioMissingError
    models = server.models()
    if not models:
        raise ChatError(f"{server.url} has no model")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio
    from starlette.middleware import Middleware

    print(f"Chat with {server.url} at http://{host}:{port}", flush=True)
    try:
        _page(server, models).launch(  # only so does gradio check that a picture was uploaded: a mounted page gives local files away
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            theme=gradio.themes.Base(**_FONTS),
            css=_STYLE,
            footer_links=[],
            max_file_size=MAX_PICTURE_BYTES,
            ssr_mode=False,
            enable_monitoring=False,
            app_kwargs={"middleware": [Middleware(_ContentPolicy)], "docs_url": None, "redoc_url": None, "openapi_url": None},
        )
    except OSError as error:
        raise ChatError(f"cannot listen on {host}:{port}: {error}".partition(" You can")[0]) from error


def _page(server: ChatServer, models: Sequence[str]) -> Any:
    import gradio

    async def answer(
        message: dict[str, Any],
        history: list[dict[str, Any]],
        model: str,
        system: str | None,
        temperature: str,
        top_p: str,
        max_tokens: str,
    ) -> AsyncGenerator[Any, None]:
        """The answer so far, again and again; a failure as its end."""
        text = ""
        try:
            sampling = {
                "temperature": _number("Temperature", temperature),
                "top_p": _number("Top p", top_p),
                "max_tokens": _number("Tokens at most", max_tokens, kind=int),
            }
            messages = await asyncio.to_thread(conversation, message, history, system)
            async with aclosing(server.answer_async(model, messages, **sampling)) as pieces:
                async for piece in pieces:
                    text += piece.reasoning + piece.text
                    yield html.escape(text, quote=False)
        except ChatError as error:
            yield gradio.ChatMessage(content=html.escape(f"{text}\n\nerror: {error}".strip(), quote=False), metadata={"id": _FAILED})

    return gradio.ChatInterface(
        answer,
        multimodal=True,
        title=f"Chat with {models[0]}" if len(models) == 1 else "Chat",
        chatbot=gradio.Chatbot(show_label=False, render_markdown=False, sanitize_html=True, latex_delimiters=[], buttons=[], height="65vh"),
        textbox=gradio.MultimodalTextbox(
            stop_btn=True,
            sources=["upload"],
            file_types=["image"],
            file_count="multiple",
            placeholder="Ask, or drop a picture here",
            max_lines=8,
        ),
        additional_inputs=[
            gradio.Dropdown(list(models), value=models[0], label="Model"),
            gradio.Textbox(label="System text", lines=2),
            *(gradio.Textbox(label=name, placeholder="the server's") for name in ("Temperature", "Top p", "Tokens at most")),
        ],
        additional_inputs_accordion=gradio.Accordion("Settings", open=False),
        analytics_enabled=False,
        flagging_mode="never",
        concurrency_limit=None,
        delete_cache=(_KEPT_S, _KEPT_S),
        api_visibility="private",
    )


def conversation(message: dict[str, Any], history: Sequence[dict[str, Any]], system: str | None) -> list[Message]:
    """gradio's history and its new message as ours. Turns that failed are left out. Raises ChatError for a picture that cannot be read."""
    messages: list[Message] = [{"role": "system", "content": system}] if system and system.strip() else []
    question: list[Message] = []
    for entry in history:
        if entry["role"] == "user":
            question += _parts(entry["content"])
            continue
        has_failed = (entry.get("metadata") or {}).get("id") == _FAILED
        if question and not has_failed:
            answer = "".join(part["text"] for part in _parts(entry["content"]) if part["type"] == "text")
            messages += [user_message(question), {"role": "assistant", "content": html.unescape(answer)}]
        question = []
    new = [*map(picture_part, message.get("files") or ()), *_parts(message.get("text") or "")]
    if not new:
        raise ChatError("there is no question; type one, or drop a picture")
    return [*messages, user_message(new)]


def _number(name: str, text: str | None, *, kind: type[int] | type[float] = float) -> float | None:
    """None where the field is empty. Raises ChatError."""
    if not text or not text.strip():
        return None
    try:
        return kind(text)
    except ValueError:
        raise ChatError(f"{name}: {text} is no number") from None


def _parts(content: Any) -> list[Message]:
    """gradio writes a text as a string or as a part, a picture as a part or as the path of its copy."""
    if isinstance(content, str):
        return [text_part(content)] if content else []
    if isinstance(content, list | tuple):
        return [part for item in content for part in _parts(item)]
    if content.get("type") == "text":
        return _parts(content["text"])
    file = content.get("file") or content
    return [picture_part(file["path"])]


class _ContentPolicy:
    """Has the browser refuse whatever would come from elsewhere."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self._app(scope, receive, with_policy if scope["type"] == "http" else send)
