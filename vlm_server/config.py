"""The server's settings: the HTTP side's own, and the engine's and the vision package's inside. Never changes after start."""

from dataclasses import dataclass, field

from engine.config import EngineConfig
from vision.config import VisionConfig
from vlm_server.tls import TlsFiles

DEFAULT_PORT = 23333


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
    strict_fields: bool = False  # refuse fields that no API documents
    max_body_bytes: int = 128 << 20
    session_store: str = "auto"  # a file, a Redis URL, memory, or auto: a file in the user's state folder
    session_ttl_s: float = 86400.0  # after a session's last turn
    max_sessions: int = 1000  # per API key
    max_session_bytes: int = 64 << 20  # of one session's pictures
    sse_ping_s: float = 0.0  # seconds between the comment lines of a silent stream; 0: none
    allow_terminate_by_client: bool = False
    enable_metrics: bool = True
    enable_docs: bool = True
    enable_ui: bool = True
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        for name, is_valid, allowed in (
            ("model_name", bool(self.model_name), "a name"),
            ("server_port", 0 <= self.server_port < 65536, "0 to 65535"),
            ("root_path", self.root_path == "" or self.root_path[0] == "/" != self.root_path[-1], "/a/path or nothing"),
            ("allow_credentials", not (self.allow_credentials and "*" in self.allow_origins), "with --allow-origins that are named, not *"),
            ("max_body_bytes", self.max_body_bytes >= 1, "at least 1"),
            ("session_store", bool(self.session_store), "a file, redis://…, memory or auto"),
            ("session_ttl_s", self.session_ttl_s > 0, "above 0 seconds"),
            ("max_sessions", self.max_sessions >= 1, "at least 1"),
            ("max_session_bytes", self.max_session_bytes >= 0, "at least 0"),
            ("sse_ping_s", self.sse_ping_s >= 0, "at least 0"),
        ):
            if not is_valid:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed, only {allowed}")

    @property
    def needs_key(self) -> bool:
        """Whether only those who bring a key are served."""
        return bool(self.api_keys or self.api_key_files)
