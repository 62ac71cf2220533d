"""The flags of `vlm-server serve`, with LMDeploy's names where one exists, and the `ServerConfig` they make.

One table: each flag says which field of which config it sets; its default is that field's. Imports nothing heavy, so that `-h` is quick.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from engine.config import AUTO_ALPHA, DEVICES, DTYPES, LOAD_FORMATS, EngineConfig
from engine.log_lines import LOG_FORMATS
from vision.config import VisionConfig
from vlm_server import alpaca
from vlm_server.answer_formats import reasoning_parser_name, tool_parser_name
from vlm_server.config import ALPACA, COMPATS, ConnectionLimits, RequestLimits, ServerConfig
from vlm_server.parsing.reasoning import REASONING_FORMATS
from vlm_server.parsing.tool_formats import TOOL_FORMATS

LOG_LEVELS = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")

# What flags that are not given mean under --compat.
_COMPAT_DEFAULTS = {ALPACA: {"server_port": alpaca.PORT, "model_name": alpaca.MODEL_NAME, "chat_template": "alpaca"}}

_CONFIGS = {
    "engine": EngineConfig,
    "vision": VisionConfig,
    "server": ServerConfig,
    "connections": ConnectionLimits,
    "limits": RequestLimits,
}


Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Flag:
    """`--name` sets `field` of `config`; `kind` is a type, a tuple of choices, bool for on and off, or list for several strings."""

    name: str
    config: str  # engine | vision | server | connections | limits; checkpoint, start: of no config, read where the server starts
    help: str
    kind: Callable[[str], Any] | tuple[str, ...] = str
    field: str = ""  # where it is not the name

    @property
    def target(self) -> str:
        return self.field or self.name.replace("-", "_")


def _named(name_of: Callable[[str], Value]) -> Callable[[str], Value]:
    """For argparse, which keeps no other exception's message."""

    def read(text: str) -> Value:
        try:
            return name_of(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _alpha(text: str) -> float | str:
    try:
        return text if text == AUTO_ALPHA else float(text)
    except ValueError:
        raise ValueError(f"{text!r} is neither a number nor {AUTO_ALPHA}") from None


FLAGS: dict[str, tuple[Flag, ...]] = {
    "model": (
        Flag("base-model", "checkpoint", "another way to give MODEL, as Chinese-LLaMA-Alpaca's users do"),
        Flag("model-name", "checkpoint", "the model's id for clients (default: MODEL as given)"),
        Flag("revision", "checkpoint", "branch, tag or commit on the hub"),
        Flag("download-dir", "checkpoint", "folder for downloads (default: the hub's cache, see HF_HOME)"),
        Flag("load-in-8bit", "engine", "keep the language model's linear layers in int8: less memory, slower", bool),
        Flag("lora-model", "checkpoint", "folder or hub id of a LoRA (PEFT) that is merged into the weights"),
        Flag("tokenizer-path", "checkpoint", "folder of another tokenizer (default: the LoRA's, if it has one, or the checkpoint's)"),
        Flag("trust-remote-code", "engine", "run code that the checkpoint brings", bool),
        Flag("load-format", "engine", "how weights are stored; dummy: random ones", LOAD_FORMATS),
        Flag("dtype", "engine", "of weights and KV cache; auto on a CPU: float32", DTYPES),
        Flag("chat-template", "server", "Jinja or JSON file, or built-in name, in place of the checkpoint's chat template"),
        Flag("chat-template-args", "server", "JSON object with words in place of a JSON file's or a built-in template's"),
        Flag("meta-instruction", "server", "system text of chats that bring none"),
        Flag(
            "tool-call-parser",
            "server",
            f"format of the model's calls: auto (by its chat template), none, {', '.join(TOOL_FORMATS)}",
            _named(tool_parser_name),
        ),
        Flag(
            "reasoning-parser",
            "server",
            f"format of the model's reasoning: auto (by its chat template), none, {', '.join(REASONING_FORMATS)}",
            _named(reasoning_parser_name),
        ),
        Flag(
            "generation-config",
            "server",
            "sampling defaults: auto (the checkpoint's), lmdeploy (LMDeploy's old ones) or a folder",
        ),
    ),
    "server": (
        Flag(
            "compat",
            "server",
            "alpaca: chats, completions and embeddings as Chinese-LLaMA-Alpaca's server has them, with its template, defaults and port",
            COMPATS,
        ),
        Flag("server-name", "server", "address to listen on"),
        Flag("server-port", "server", "port to listen on; 0: any free one", int),
        Flag("root-path", "server", "prefix that a reverse proxy strips, e.g. /vlm"),
        Flag("api-keys", "start", "keys, one of which every request must bring, or @FILE for --api-keys-file (default: none)", list),
        Flag("api-keys-file", "start", "TOML file of keys with names and quotas; SIGHUP has it read again", list),
        Flag("ssl-certfile", "start", "PEM file of the certificate: the server speaks HTTPS alone"),
        Flag("ssl-keyfile", "start", "PEM file of its key (default: in --ssl-certfile); SSL_KEYFILE_PASSWORD in the environment opens it"),
        Flag("ssl", "start", "HTTPS with the files that SSL_CERTFILE and SSL_KEYFILE in the environment name", bool),
        Flag("allow-origins", "server", "CORS: origins", list),
        Flag("allow-methods", "server", "CORS: methods", list),
        Flag("allow-headers", "server", "CORS: headers", list),
        Flag("allow-credentials", "server", "CORS: credentials", bool),
        Flag("strict-fields", "server", "refuse request fields that no API documents, instead of a warning", bool),
        Flag("share-caches", "server", "let API keys use what others' pictures and prompts left in the caches", bool),
        Flag("max-body-bytes", "server", "largest request body", int),
        Flag(
            "session-store",
            "server",
            "where sessions, kept responses and uploaded files live: a file (SQLite), redis://… for several servers, memory, or "
            "auto: a file in the state folder",
        ),
        Flag("session-ttl", "server", "seconds that a session is kept after its last turn", float, "session_ttl_s"),
        Flag("max-sessions", "server", "sessions kept per API key; those that are unused for longest end first", int),
        Flag("max-session-bytes", "server", "pictures kept per session, and items per response", int),
        Flag("response-ttl", "server", "seconds that a response of /v1/responses is kept", float, "response_ttl_s"),
        Flag("max-responses", "server", "responses kept per API key; the oldest end first", int),
        Flag("file-ttl", "server", "seconds that an uploaded file is kept, unless its upload says otherwise", float, "file_ttl_s"),
        Flag("max-file-ttl", "server", "most seconds that an upload may ask for", float, "max_file_ttl_s"),
        Flag("max-files", "server", "files kept per API key; more are refused until some end", int),
        Flag("max-file-bytes-per-key", "server", "bytes of all files of an API key; more are refused until some end", int),
        Flag("sse-ping-s", "server", "seconds between comment lines in a silent stream; 0: none", float),
        Flag("drain-timeout-s", "server", "seconds that running requests have when the server is told to stop", float),
        Flag("send-timeout-s", "connections", "seconds that a client may leave an answer unread", float, "send_s"),
        Flag("keep-alive-timeout-s", "connections", "seconds that a connection is kept between requests", float, "keep_alive_s"),
        Flag("head-timeout-s", "connections", "seconds for a request's line and headers", float, "head_s"),
        Flag("body-timeout-s", "connections", "seconds for a request's body", float, "body_s"),
        Flag("body-pause-timeout-s", "connections", "seconds between two pieces of a request's body", float, "body_pause_s"),
        Flag("allow-terminate-by-client", "server", "let GET /terminate end the server", bool),
        Flag("enable-abort-handling", "server", "let POST /abort_request end requests of the same API key", bool),
        Flag("metrics", "server", "GET /metrics and /status, and the status page", bool, "enable_metrics"),
        Flag("fastapi-docs", "server", "GET / and /openapi.json", bool, "enable_docs"),
        Flag("ui", "server", "the chat page, GET /ui, and the status page, GET /ui/status", bool, "enable_ui"),
        Flag(
            "otlp-endpoint",
            "server",
            "OpenTelemetry collector that gets traces of requests, e.g. http://127.0.0.1:4318 (default: none; needs vlm-server[tracing])",
        ),
        Flag("log-level", "server", "what is logged", LOG_LEVELS),
        Flag("log-format", "engine", "text for people, or json: one object per line, requests with fields of their own", LOG_FORMATS),
    ),
    "engine": (
        Flag("device", "engine", "where the model runs", DEVICES),
        Flag("gpus", "checkpoint", "CUDA devices, e.g. 0,1, each for one tensor-parallel process (default: the first --tp)"),
        Flag("only-cpu", "checkpoint", "run on the CPU, whatever --gpus says", bool),
        Flag("tp", "engine", "tensor-parallel processes", int),
        Flag("session-len", "engine", "tokens of prompt and answer together (default: the checkpoint's)", int),
        Flag(
            "alpha",
            "engine",
            "above 1: scale rotary positions (NTK) for a window longer than the checkpoint's; auto: as --session-len asks for",
            _named(_alpha),
        ),
        Flag("max-batch-size", "engine", "requests computed at once", int),
        Flag("cache-max-entry-count", "engine", "KV cache: below 1 a share of the free memory, else blocks (default: by device)", float),
        Flag("cache-block-seq-len", "engine", "tokens per KV block", int),
        Flag("enable-prefix-caching", "engine", "keep the KV of prompts for later ones that begin alike", bool),
        Flag("max-prefill-token-num", "engine", "prompt tokens computed in one step", int),
        Flag("max-waiting", "engine", "requests whose answer may wait to begin; more are refused with 429", int),
        Flag("max-queued-tokens", "server", "prompt tokens that may wait; over it a request waits --budget-wait-s, then 429", int),
        Flag("num-threads", "engine", "CPU threads of the engine (default: all cores)", int),
        Flag("embedding-cache-bytes", "engine", "memory for the embeddings of pictures seen before", int),
        Flag("encoder-share", "engine", "share of the time that new pictures and prompts may take from running answers", float),
        Flag("seed", "engine", "of requests without their own, and of dummy weights", int),
    ),
    "pictures": (
        Flag("allow-private-media", "vision", "networks (CIDR) that picture URLs may point to although they are not public", list),
        Flag("allowed-media-domains", "vision", "hosts that picture URLs may name, *.example.org for all under one (default: all)", list),
        Flag("media-proxy", "vision", "http://host:port of a proxy for pictures; those of the environment are not used"),
        Flag("allowed-local-media-path", "vision", "folder that file: URLs may name (default: none)"),
        Flag("max-picture-bytes", "vision", "largest picture as sent", int),
        Flag("max-picture-pixels", "vision", "largest picture, width × height", int),
        Flag(
            "max-media-bytes-in-flight",
            "vision",
            "memory for bodies, pictures' files, kept conversations and large answers of all requests; over it one waits, then 503",
            int,
        ),
        Flag(
            "max-pixels-in-flight",
            "vision",
            "pixels (3 bytes each) of all requests, decoded and not taken over by the engine; over it as above",
            int,
        ),
        Flag("budget-wait-s", "vision", "seconds that a request waits for a part of these, and for --max-queued-tokens", float),
        Flag("max-redirects", "vision", "redirects followed for one picture", int),
        Flag("connect-timeout-s", "vision", "seconds for a picture's server to be found and reached", float),
        Flag("first-byte-timeout-s", "vision", "seconds for a picture's first byte, and between two", float),
        Flag("fetch-timeout-s", "vision", "seconds for one picture's download", float),
        Flag("min-download-bytes-per-s", "vision", "slower downloads are given up after a few seconds", float),
        Flag("max-downloads-per-host", "vision", "downloads from one host at once; more wait", int),
        Flag("max-download-retries", "vision", "times that a download whose failure may pass is tried again", int),
        Flag("download-cache-bytes", "vision", "memory for downloaded pictures that HTTP lets us use again", int),
        Flag("num-decode-workers", "vision", "processes that decode pictures", int),
        Flag("decode-memory-bytes", "vision", "memory of one of them, beyond what it holds when idle", int),
        Flag("decode-timeout-s", "vision", "seconds for one picture to be decoded", float),
        Flag("num-preprocess-workers", "vision", "processes that resize and tile pictures", int),
        Flag("preprocess-timeout-s", "vision", "seconds for one picture to be resized and tiled", float),
        Flag("processed-cache-bytes", "vision", "memory for processed pictures that may come again", int),
        Flag("processed-cache-pictures", "vision", "most pictures in it", int),
    ),
    "limits of one request": (
        Flag("max-pictures", "limits", "pictures in all its messages", int),
        Flag("max-request-picture-bytes", "vision", "bytes of all its pictures together, as sent", int),
        Flag("max-request-pixels", "vision", "pixels of all its pictures together", int),
        Flag("max-messages", "limits", "messages, those that the server kept included", int),
        Flag("max-n", "limits", "most that n and best_of may be", int, "max_choices"),
        Flag("max-answers", "limits", "answers, to all its prompts together", int),
        Flag("max-stop-strings", "limits", "stop strings", int),
        Flag("max-stop-characters", "limits", "characters of all its stop strings together", int),
        Flag("max-schema-characters", "limits", "characters of a schema or grammar, or of all tools", int),
        Flag("max-json-depth", "limits", "levels of lists and objects in its body", int),
        Flag("max-json-values", "limits", "values in its body", int),
        Flag("max-json-containers", "limits", "lists and objects in its body", int),
        Flag("max-prompt-characters", "limits", "characters of a prompt's text", int),
        Flag("template-timeout-s", "limits", "seconds of processor time of the chat template", float),
    ),
}


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            _add(group, flag)


def normalized(arguments: Sequence[str]) -> list[str]:
    """`--session_len` as `--session-len`; values stay as they are."""
    return [_normalized(argument) for argument in arguments]


def values_for(config: str, parsed: argparse.Namespace) -> dict[str, Any]:
    """The fields of one config, as the flags set them."""
    flags = (flag for group in FLAGS.values() for flag in group if flag.config == config)
    return {flag.target: _frozen(getattr(parsed, flag.target)) for flag in flags}


def compat_defaults(parsed: argparse.Namespace) -> dict[str, Any]:
    """What flags that are not given mean instead, where the command has --compat."""
    return dict(_COMPAT_DEFAULTS.get(getattr(parsed, "compat", ""), {}))


def device_values(parsed: argparse.Namespace) -> dict[str, Any]:
    """The engine's fields that --gpus and --only-cpu set. Raises ValueError where other flags say something else."""
    if parsed.only_cpu:
        if parsed.device == "cuda":
            raise ValueError("only_cpu: not allowed with --device cuda")
        return {"device": "cpu"}
    if parsed.gpus is None:
        return {}
    gpus = tuple(name.strip() for name in parsed.gpus.split(","))
    if parsed.device == "cpu":
        raise ValueError("gpus: not allowed with --device cpu")
    if parsed.tp not in (1, len(gpus)):
        raise ValueError(
            f"tp: {parsed.tp} is not allowed with --gpus {parsed.gpus}, only {len(gpus)}: each process has a device of its own"
        )
    return {"device": "cuda", "gpus": gpus, "tp": len(gpus)}


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _normalized(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
    default = _default(flag)
    shown = "" if default is None or "(default:" in flag.help else f" (default: {_shown(default)})"
    options: dict[str, Any] = {"dest": flag.target, "default": default, "help": flag.help.replace("%", "%%") + shown}
    if flag.kind is bool:
        group.add_argument(f"--{flag.name}", action=argparse.BooleanOptionalAction, **options)
        return
    if flag.kind is list:
        options |= {"nargs": "*", "metavar": "X"}
    elif isinstance(flag.kind, tuple):
        options |= {"choices": flag.kind}
    else:
        options |= {"type": flag.kind, "metavar": "N" if flag.kind in (int, float) else "X"}
    group.add_argument(f"--{flag.name}", **options)


def _default(flag: Flag) -> Any:
    if flag.config not in _CONFIGS:
        return None
    return next(field.default for field in fields(_CONFIGS[flag.config]) if field.name == flag.target)


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return " ".join(map(str, default)) or "none" if isinstance(default, tuple) else str(default) or "none"
