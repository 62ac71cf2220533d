"""The server's settings: the HTTP side's own, and the engine's and the vision package's inside. Never changes after start."""

from dataclasses import dataclass, field, fields

from engine.config import EngineConfig
from vision.config import VisionConfig
from vlm_server.tls import TlsFiles

DEFAULT_PORT = 23333
ALPACA = "alpaca"
COMPATS = ("none", ALPACA)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """How long a client may hold a connection without getting on, in seconds."""

    head_s: float = 10.0  # from a connection's beginning, or a request's first byte, to the end of its headers
    body_pause_s: float = 30.0  # between two pieces of a body
    body_s: float = 600.0  # for all of a body
    keep_alive_s: float = 65.0  # between requests; longer than clients keep theirs, so that none sends into a connection that is closed
    send_s: float = 60.0  # for which a client may leave an answer unread, once the buffers are full

    def __post_init__(self) -> None:
        for name in ("head_s", "body_pause_s", "body_s", "keep_alive_s", "send_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed, only above 0 seconds")


# The most that the flags of these names may allow: routes know no more.
MAX_CHOICES = 128
MAX_STOP_STRINGS = 64
MAX_SCHEMA_CHARACTERS = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What one request may hold and ask for. A limit is never switched off, only set. Pictures' bytes and pixels: see `VisionConfig`."""

    max_pictures: int = 128  # in all its messages, also in those that the server kept
    max_messages: int = 4096  # those that the server kept included
    max_choices: int = MAX_CHOICES  # n, best_of
    max_answers: int = 1024  # prompts × answers to each
    max_stop_strings: int = MAX_STOP_STRINGS
    max_stop_characters: int = 16384  # of all stop strings together
    max_schema_characters: int = MAX_SCHEMA_CHARACTERS  # of a schema or grammar, or of all tools, as JSON
    max_json_depth: int = 128  # levels of lists and objects in a body
    max_json_values: int = 2_000_000  # in a body; each takes about a hundred bytes of memory, however short it was written
    max_json_containers: int = 20_000  # lists and objects among them; a message of parts and calls is a few
    max_prompt_characters: int = 1 << 20  # of one prompt's text
    template_timeout_s: float = 3.0  # processor time of the chat template for one prompt

    def __post_init__(self) -> None:
        for name in (limit.name for limit in fields(self)):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed, only above 0")
        for name, most in (
            ("max_choices", MAX_CHOICES),
            ("max_stop_strings", MAX_STOP_STRINGS),
            ("max_schema_characters", MAX_SCHEMA_CHARACTERS),
        ):
            if getattr(self, name) > most:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed, only 1 to {most}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """One server. What the flags of `vlm-server serve` set."""

    engine: EngineConfig
    vision: VisionConfig = field(default_factory=VisionConfig)
    model_name: str  # the id in GET /v1/models, and what a request's `model` must be
    model_root: str  # the folder or hub id that was asked for
    tokenizer_folder: str | None = None  # None: the checkpoint's
    server_name: str = "0.0.0.0"
    server_port: int = DEFAULT_PORT
    root_path: str = ""  # the prefix that a reverse proxy strips
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # without these and files every key is accepted
    api_key_files: tuple[str, ...] = ()  # TOML, with names and quotas; see api_keys
    tls: TlsFiles | None = None  # with them the server speaks HTTPS alone
    allow_origins: tuple[str, ...] = ("*",)
    allow_methods: tuple[str, ...] = ("*",)
    allow_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    chat_template: str | None = None  # a file or a built-in name; None: the checkpoint's own
    chat_template_args: str | None = None  # a JSON object: words in place of the template's
    meta_instruction: str | None = None  # the system text of chats that bring none
    tool_call_parser: str = "auto"  # see answer_formats; auto: by the chat template
    reasoning_parser: str = "auto"
    generation_config: str = "auto"  # auto | lmdeploy | a folder
    compat: str = "none"  # whose chats, completions and embeddings; alpaca: Chinese-LLaMA-Alpaca's
    strict_fields: bool = False  # refuse fields that no API documents
    share_caches: bool = False  # between API keys; else each has pictures, embeddings and prefixes of its own
    max_body_bytes: int = 128 << 20
    max_queued_tokens: int = 512 << 10  # prompt tokens of requests that wait in the engine; over it requests wait, then are refused
    session_store: str = "auto"  # a file, a Redis URL, memory, or auto: a file in the user's state folder
    session_ttl_s: float = 86400.0  # after a session's last turn
    max_sessions: int = 1000  # per API key
    max_session_bytes: int = 64 << 20  # of one session's pictures, of one kept response's items
    response_ttl_s: float = 86400.0  # after a response was made
    max_responses: int = 1000  # per API key
    file_ttl_s: float = 86400.0  # of an uploaded file that states no other
    max_file_ttl_s: float = 2592000.0  # that one may state
    max_files: int = 1000  # per API key
    max_file_bytes_per_key: int = 256 << 20
    sse_ping_s: float = 0.0  # seconds between the comment lines of a silent stream; 0: none
    drain_timeout_s: float = 30.0  # for running requests, when the server is told to stop
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    limits: RequestLimits = field(default_factory=RequestLimits)
    allow_terminate_by_client: bool = False
    enable_abort_handling: bool = False
    enable_metrics: bool = True
    enable_docs: bool = True
    enable_ui: bool = True
    otlp_endpoint: str | None = None  # an OpenTelemetry collector's; None: no traces
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        for name, is_valid, allowed in (
            ("model_name", bool(self.model_name), "a name"),
            ("server_port", 0 <= self.server_port < 65536, "0 to 65535"),
            ("compat", self.compat in COMPATS, " | ".join(COMPATS)),
            ("root_path", self.root_path == "" or self.root_path[0] == "/" != self.root_path[-1], "/a/path or nothing"),
            ("allow_credentials", not (self.allow_credentials and "*" in self.allow_origins), "with --allow-origins that are named, not *"),
            ("max_body_bytes", self.max_body_bytes >= 1, "at least 1"),
            ("max_queued_tokens", self.max_queued_tokens >= 1, "at least 1"),
            ("session_store", bool(self.session_store), "a file, redis://…, memory or auto"),
            ("session_ttl_s", self.session_ttl_s > 0, "above 0 seconds"),
            ("max_sessions", self.max_sessions >= 1, "at least 1"),
            ("max_session_bytes", self.max_session_bytes >= 0, "at least 0"),
            ("drain_timeout_s", self.drain_timeout_s >= 0, "at least 0"),
            ("max_file_ttl_s", self.max_file_ttl_s > 0, "above 0 seconds"),
            (
                "file_ttl_s",
                0 < self.file_ttl_s <= self.max_file_ttl_s,
                f"above 0 and at most max_file_ttl_s, {self.max_file_ttl_s:g}",
            ),
            ("max_files", self.max_files >= 0, "at least 0"),
            ("max_file_bytes_per_key", self.max_file_bytes_per_key >= 0, "at least 0"),
            ("response_ttl_s", self.response_ttl_s > 0, "above 0 seconds"),
            ("max_responses", self.max_responses >= 1, "at least 1"),
            (
                "otlp_endpoint",
                self.otlp_endpoint is None or self.otlp_endpoint.startswith(("http://", "https://")),
                "http://… or https://…",
            ),
            ("sse_ping_s", self.sse_ping_s >= 0, "at least 0"),
        ):
            if not is_valid:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed, only {allowed}")

    @property
    def needs_key(self) -> bool:
        """Whether only those who bring a key are served."""
        return bool(self.api_keys or self.api_key_files)
