"""`vlm-server`: serve, chat, gradio, check_env. Heavy imports happen in the commands, so that help and mistakes are quick."""

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlm_server import __version__
from vlm_server.config import DEFAULT_PORT, ConnectionLimits, RequestLimits, ServerConfig
from vlm_server.flags import add_serve_flags, compat_defaults, device_values, normalized, values_for

if TYPE_CHECKING:
    from vlm_server.chat_client import ChatServer

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "VLM_SERVER_API_KEY"
CA_FILE_VARIABLE = "SSL_CERT_FILE"  # OpenSSL's own

_SECRET_VARIABLES = ("VLM_SERVER_API_KEYS", "SSL_KEYFILE_PASSWORD")  # not for the processes that the server starts

_LEGACY_WORDS = {"api_server": "serve", "api_client": "chat", "gradio": "gradio"}  # lmdeploy serve api_server MODEL, … api_client URL


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parsed = parse(sys.argv[1:] if arguments is None else arguments)
    command = {"serve": _serve, "chat": _chat, "gradio": _gradio, "check_env": _check_env}[parsed.command]
    return command(parsed)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command and its flags. Exits with a message where they are wrong."""
    words = _without_legacy_word(normalized(arguments))
    parsed = _parser().parse_args(words)
    defaults = compat_defaults(parsed)
    return _parser(defaults).parse_args(words) if defaults else parsed


def server_config(parsed: argparse.Namespace) -> ServerConfig:
    """The settings that the flags make; finds, downloads or assembles the checkpoint. Raises CheckpointError or ValueError."""
    from engine.config import AUTO_ALPHA, EngineConfig
    from vision.config import VisionConfig
    from vlm_server.checkpoint import find_adapter, find_checkpoint, find_tokenizer
    from vlm_server.template_choice import read_chosen
    from vlm_server.tracing import check_installed

    secrets = _secrets(parsed)  # a mistake is known before a download
    if parsed.otlp_endpoint:
        check_installed()
    read_chosen(parsed.chat_template, parsed.chat_template_args, parsed.meta_instruction)
    checkpoint = find_checkpoint(
        _model(parsed), revision=parsed.revision, download_dir=parsed.download_dir, trust_remote_code=parsed.trust_remote_code
    )
    adapter = find_adapter(parsed.lora_model, download_dir=parsed.download_dir) if parsed.lora_model else None
    fields = values_for("engine", parsed) | device_values(parsed)
    engine = EngineConfig(model_folder=checkpoint.path, lora_folder=adapter, **fields)
    engine = engine.resolve(checkpoint.text_config(trust_remote_code=parsed.trust_remote_code))
    if parsed.alpha == AUTO_ALPHA and engine.alpha == 1:
        logger.warning("--alpha auto changes nothing: the window is no longer than the checkpoint's; --session-len sets one that is")
    return ServerConfig(
        engine=engine,
        vision=VisionConfig(**values_for("vision", parsed)),
        model_name=parsed.model_name or checkpoint.name,
        model_root=checkpoint.root,
        tokenizer_folder=find_tokenizer(parsed.tokenizer_path, adapter=adapter),
        connections=ConnectionLimits(**values_for("connections", parsed)),
        limits=RequestLimits(**values_for("limits", parsed)),
        **values_for("server", parsed),
        **secrets,
    )


def _secrets(parsed: argparse.Namespace) -> dict[str, Any]:
    """Keys and certificate, of flags and environment, as fields of the config. Raises ApiKeysError or TlsError."""
    from vlm_server.api_keys import ENVIRONMENT_VARIABLE, key_sources, load_keys
    from vlm_server.tls import tls_files

    keys, files = key_sources(parsed.api_keys, parsed.api_keys_file, os.environ.get(ENVIRONMENT_VARIABLE))
    load_keys(keys, files)
    tls = tls_files(parsed.ssl_certfile, parsed.ssl_keyfile, from_environment=parsed.ssl, environment=os.environ)
    if tls is not None:
        tls.check()
    return {"api_keys": tuple(keys), "api_key_files": tuple(files), "tls": tls}


def _model(parsed: argparse.Namespace) -> str | None:
    if parsed.model is not None and parsed.base_model is not None:
        raise ValueError(f"base_model: MODEL is given already: {parsed.model}; only one of the two is allowed")
    return parsed.base_model if parsed.model is None else parsed.model  # type: ignore[no-any-return]


def _parser(serve_defaults: Mapping[str, Any] | None = None) -> argparse.ArgumentParser:
    """serve_defaults: in place of the flags' own."""
    parser = argparse.ArgumentParser(prog="vlm-server", description="An OpenAI-compatible server for image-text models.")
    parser.add_argument("-v", "--version", action="version", version=f"vlm-server {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve a model over HTTP", description=_serve.__doc__, allow_abbrev=False)
    serve.add_argument("model", nargs="?", metavar="MODEL", help="folder, hub id or GGUF file (default: the embedded demonstration model)")
    add_serve_flags(serve)
    serve.set_defaults(**(serve_defaults or {}))
    _add_chat(commands.add_parser("chat", help="chat with a server in the terminal", description=_chat.__doc__, allow_abbrev=False))
    _add_gradio(commands.add_parser("gradio", help="a chat page for a server", description=_gradio.__doc__, allow_abbrev=False))
    check_env = commands.add_parser("check_env", aliases=["check-env"], help="print what this machine and installation have")
    check_env.add_argument("--dump-file", metavar="FILE", help="write it as JSON too")
    check_env.set_defaults(command="check_env")
    return parser


def _without_legacy_word(arguments: list[str]) -> list[str]:
    """`serve api_server MODEL …` is `serve MODEL …`; `--disable-…`, as LMDeploy's users type it, is `--no-…`."""
    words = [_DISABLING_SWITCHES.get(argument, argument) for argument in arguments]
    if words[:1] == ["serve"] and len(words) > 1 and words[1] in _LEGACY_WORDS:
        return [_LEGACY_WORDS[words[1]], *words[2:]]
    return words


def _add_chat(parser: argparse.ArgumentParser) -> None:
    _add_server(parser)
    parser.add_argument("--model", metavar="NAME", help="one of the server's models (default: its first)")
    parser.add_argument("--system", metavar="TEXT", help="system text of the conversation")
    parser.add_argument("--temperature", type=float, metavar="N", help="0 is greedy (default: the server's)")
    parser.add_argument(
        "--top-p", type=float, metavar="N", help="keep the likeliest tokens that reach this probability (default: the server's)"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="new tokens at most (default: the server's)")
    parser.add_argument("--session-id", type=int, metavar="N", help="LMDeploy's, without effect: the conversation is kept here")


def _add_gradio(parser: argparse.ArgumentParser) -> None:
    _add_server(parser)
    parser.add_argument("--server-name", default="127.0.0.1", metavar="X", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--server-port", type=int, default=6006, metavar="N", help="port to listen on (default: 6006)")


def _add_server(parser: argparse.ArgumentParser) -> None:
    """Which server, for the commands that ask one."""
    url = f"http://127.0.0.1:{DEFAULT_PORT}"
    parser.add_argument("url", nargs="?", metavar="URL", default=url, help=f"the server (default: {url})")
    parser.add_argument("--api-key", metavar="KEY", help=f"the server's key (default: {API_KEY_VARIABLE} in the environment)")
    parser.add_argument(
        "--cafile", metavar="FILE", help=f"PEM file of the certificates that are trusted (default: {CA_FILE_VARIABLE}, or well-known ones)"
    )


_DISABLING_SWITCHES = {"--disable-metrics": "--no-metrics", "--disable-fastapi-docs": "--no-fastapi-docs", "--disable-ui": "--no-ui"}


def _serve(parsed: argparse.Namespace) -> int:
    """Serve a model over HTTP. Flags take - and _ alike."""
    _set_up_logging(parsed.log_level, parsed.log_format)
    from vlm_server.checkpoint import CheckpointError
    from vlm_server.serving import ServingError, serve

    try:
        config = server_config(parsed)
        for name in _SECRET_VARIABLES:
            os.environ.pop(name, None)
        serve(config)
    except (CheckpointError, ServingError, ValueError) as error:
        print(f"vlm-server: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _chat(parsed: argparse.Namespace) -> int:
    """Chat with a server in the terminal. An empty line sends; /image PATH_OR_URL adds a picture; end and exit end."""
    from vlm_server.chat_client import ChatError
    from vlm_server.terminal import TerminalChat

    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows fewer characters ends nothing
    is_typed = sys.stdin.isatty()
    if is_typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() edits lines with it)
    try:
        server = _server_of(parsed)
        model = server.chosen_model(parsed.model)
    except ChatError as error:
        print(f"vlm-server: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"{model} at {server.url}")
    sampling = {"temperature": parsed.temperature, "top_p": parsed.top_p, "max_tokens": parsed.max_tokens}
    TerminalChat(
        server,
        model,
        read_line=input if is_typed else lambda prompt: input(),
        output=sys.stdout,
        system=parsed.system,
        sampling=sampling,
    ).run()
    return 0


def _gradio(parsed: argparse.Namespace) -> int:
    """Serve a chat page for a server, made with gradio (an optional package). Whoever opens the page uses the server with your key."""
    from vlm_server.chat_client import ChatError
    from vlm_server.gradio_page import GradioMissingError, serve_page

    try:
        serve_page(_server_of(parsed), host=parsed.server_name, port=parsed.server_port)
    except (ChatError, GradioMissingError) as error:
        print(f"vlm-server: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _server_of(parsed: argparse.Namespace) -> "ChatServer":
    from vlm_server.chat_client import ChatServer

    key = parsed.api_key or os.environ.get(API_KEY_VARIABLE)
    return ChatServer(parsed.url, key, ca_file=parsed.cafile or os.environ.get(CA_FILE_VARIABLE))


def _set_up_logging(level: str, log_format: str) -> None:
    from engine.log_lines import set_up_logging

    set_up_logging(level, log_format)
    # At debug they log every answer's text, each file of a download, each start, and every piece of a form.
    for name in ("sse_starlette", "httpx2", "uvicorn", "python_multipart"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


def _check_env(parsed: argparse.Namespace) -> int:
    from vlm_server.environment import describe_environment, write_json

    facts = describe_environment()
    for name, value in facts.items():
        print(f"{name}: {value}")
    if parsed.dump_file:
        write_json(parsed.dump_file, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
