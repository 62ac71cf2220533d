"""The arrows between our modules, and that the code has no others.

A module may import what stands beside it in MAY_IMPORT, and nothing else of ours. A new module or a new arrow is a change here, made on
purpose: first ask whether the arrow could point the other way, or whether a plain value could be passed instead.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("engine", "vision", "vlm_server")

# Names are separated by blanks; a leading dot stands for the module's own top-level package, a trailing .* for all modules in a folder.
MAY_IMPORT = {
    "engine": "vision",
    "engine.announced": ".request",
    "engine.announcing": ".messages .request vision.shared_array",
    "engine.attention": "",
    "engine.attention.base": ".batch",
    "engine.attention.torch_backend": ".attention.base .batch .request",
    "engine.batch": ".request",
    "engine.beams": ".request .scheduler",
    "engine.channel": "vision.shared_array",
    "engine.client": ".announcing .channel .config .messages .pulse .request .unread",
    "engine.config": ".log_lines",
    "engine.continuations": ".beams .sampler",
    "engine.core": (
        ".announced .beams .config .continuations .encoding .first_token .guided .pacing .reading .request .sampler .scheduler .workers"
    ),
    "engine.encoding": ".request .slices vision.encoder",
    "engine.first_token": "",
    "engine.garbage": "",
    "engine.guided": ".request",
    "engine.kv_cache": "",
    "engine.layers": "",
    "engine.layers.embedding": ".layers.linear .layers.packed .layers.parallel",
    "engine.layers.int8": ".layers.parallel",
    "engine.layers.linear": ".layers.int8 .layers.packed .layers.parallel",
    "engine.layers.norm": ".layers.linear",
    "engine.layers.packed": ".layers.int8",
    "engine.layers.parallel": "",
    "engine.layers.rotary": "",
    "engine.log_lines": "",
    "engine.messages": ".config .request",
    "engine.model_runner": (
        ".attention.base .attention.torch_backend .batch .config .layers.packed .layers.parallel .layers.rotary .models.decoder "
        ".models.fallback .models.lora .models.registry .models.weights .reading .request vision.encoder vision.tower_parts"
    ),
    "engine.models": "",
    "engine.models.decoder": ".attention.base .layers.embedding .layers.linear .layers.norm .layers.parallel .layers.rotary",
    "engine.models.fallback": ".attention.base .models.registry .models.weights",
    "engine.models.lora": ".models.registry .models.weights",
    "engine.models.registry": ".models.decoder",
    "engine.models.weights": ".layers.linear .models.registry",
    "engine.pacing": "",
    "engine.pictures": ".kv_cache .request .row .turns",
    "engine.process": ".channel .core .garbage .log_lines .messages .request",
    "engine.pulse": "",
    "engine.reading": ".batch .request .sampler",
    "engine.request": "vision.shared_array",
    "engine.row": ".kv_cache .request",
    "engine.sampler": ".request",
    "engine.scheduler": ".config .kv_cache .pictures .request .row .searches .shares .turns",
    "engine.searches": ".request .row",
    "engine.shares": ".kv_cache .request .row .searches",
    "engine.slices": "",
    "engine.turns": "",
    "engine.unread": ".request",
    "engine.workers": ".channel .config .garbage .layers.parallel .messages .model_runner .request",
    "vision": "",
    "vision.addresses": ".config",
    "vision.body": ".data_url .image",
    "vision.budget": "",
    "vision.cache": "",
    "vision.config": "",
    "vision.confinement": "",
    "vision.connector": "",
    "vision.data_url": ".image",
    "vision.decode": ".frames .image .pixels .worker_start",
    "vision.decode_pool": ".budget .config .decode .frames .image .shared_array .workers",
    "vision.download": ".addresses .body .budget .config .connector .host_slots .http_cache .image .look_ups .urls",
    "vision.encoder": ".families",
    "vision.families": ".geometry .resolution",
    "vision.fetcher": ".addresses .budget .config .data_url .download .http_cache .image .media_budgets .single_flight .urls",
    "vision.frames": ".image .shared_array",
    "vision.geometry": "",
    "vision.host_slots": ".budget",
    "vision.http_cache": ".cache",
    "vision.image": ".geometry .shared_array",
    "vision.look_ups": ".budget .media_budgets",
    "vision.media_budgets": ".budget .config",
    "vision.pixels": ".image .shared_array",
    "vision.preprocess": ".frames .geometry .image .shared_array .worker_start",
    "vision.preprocess_pool": ".budget .config .frames .image .preprocess .shared_array .workers",
    "vision.processor": ".families .geometry .image .resolution",
    "vision.request_room": ".config .image",
    "vision.resolution": ".image",
    "vision.service": (
        ".addresses .budget .cache .config .decode_pool .fetcher .image .media_budgets .preprocess .preprocess_pool .request_room "
        ".shared_array .single_flight .workers"
    ),
    "vision.shared_array": "",
    "vision.single_flight": "",
    "vision.tower_parts": "",
    "vision.urls": ".image",
    "vision.worker_start": ".confinement .frames",
    "vision.workers": ".confinement .frames",
    "vlm_server": "",
    "vlm_server.aborting": "",
    "vlm_server.admission": ".auth .errors .metering .quotas",
    "vlm_server.alpaca": "",
    "vlm_server.alpaca_protocol": ".alpaca .embedding_protocol .message_schema .protocol .response_schema",
    "vlm_server.alpaca_shapes": ".alpaca .errors .generation .shapes .stage_timings .streaming",
    "vlm_server.announcing": "engine.request vision.image",
    "vlm_server.answer_formats": ".parsing.reasoning .parsing.tool_formats",
    "vlm_server.answer_grammar": ".backend .errors .tools engine.guided",
    "vlm_server.anthropic": "",
    "vlm_server.anthropic.field_names": ".errors",
    "vlm_server.anthropic.models": ".context .errors",
    "vlm_server.anthropic.protocol": ".config .image_protocol .message_schema .nesting .protocol .tool_schema",
    "vlm_server.anthropic.response_schema": ".error_codes .response_schema",
    "vlm_server.anthropic.shapes": (
        ".anthropic.protocol .errors .generation .nesting .parsing.events .stage_timings .streaming engine.request"
    ),
    "vlm_server.anthropic.translation": ".anthropic.field_names .anthropic.protocol .anthropic.turns .errors .protocol",
    "vlm_server.anthropic.turns": ".anthropic.field_names .anthropic.protocol",
    "vlm_server.api_calls": "",
    "vlm_server.api_keys": ".quotas",
    "vlm_server.app": (
        ".aborting .admission .answer_formats .api_keys .auth .backend .body_budget .chat_page .config .context .docs .errors .files "
        ".jinja_process .loop_lag .metered_engine .metrics .middleware .queued_tokens .quotas .readiness .responses.records .routes.* "
        ".sampling .sessions.history .sessions.opening .sessions.store .stage_totals .status_board .tracing .turns .waiting_room "
        "engine.request vision.budget vision.image vision.service"
    ),
    "vlm_server.auth": ".api_keys .errors .middleware .quotas",
    "vlm_server.backend": (
        ".config .detokenizer .grammar_pool .jinja_process .jinja_worker .picture_report .pipeline .probe .readiness .stage_timings "
        ".transcript engine.client engine.request vision.config vision.image vision.media_budgets vision.request_room vision.service"
    ),
    "vlm_server.body_budget": ".auth .errors vision.budget vision.media_budgets",
    "vlm_server.built_in_templates": ".alpaca .role_template",
    "vlm_server.chat_client": ".client",
    "vlm_server.chat_page": ".config .examples",
    "vlm_server.chat_template": ".internlm_tools .jinja_process engine.request",
    "vlm_server.chats": (
        ".aborting .answer_grammar .auth .context .files .generation .guided .middleware .picture_report .protocol .stage_timings "
        ".streaming .tools engine.request"
    ),
    "vlm_server.checkpoint": ".embedded vision",
    "vlm_server.cli": (
        ".api_keys .chat_client .checkpoint .config .environment .flags .gradio_page .serving .template_choice .terminal .tls .tracing "
        "engine.config engine.log_lines vision.config vlm_server"
    ),
    "vlm_server.client": ".api_calls",
    "vlm_server.client_schemas": "",
    "vlm_server.config": ".tls engine.config vision.config",
    "vlm_server.connections": ".config",
    "vlm_server.context": (
        ".aborting .answer_formats .auth .backend .config .detokenizer .embedding_protocol .errors .field_rules .files .generation "
        ".interactive_protocol .metrics .middleware .parsing.answer .protocol .request_limits .responses.records .responses.request "
        ".sampling .token_protocol .turns engine.request"
    ),
    "vlm_server.detokenizer": "",
    "vlm_server.docs": ".anthropic.response_schema .auth .client_schemas .config .examples .response_schema .responses.schema vlm_server",
    "vlm_server.echo": ".backend .logprobs engine.request",
    "vlm_server.embedded": "",
    "vlm_server.embedding_protocol": ".message_schema .protocol",
    "vlm_server.environment": "vlm_server",
    "vlm_server.error_codes": "",
    "vlm_server.errors": ".error_codes .jinja_process .quotas .sessions.history .sessions.store engine.request vision.budget vision.image",
    "vlm_server.examples": "",
    "vlm_server.field_rules": (
        ".alpaca_protocol .anthropic.protocol .embedding_protocol .errors .file_protocol .format_protocol .generate_protocol "
        ".interactive_protocol .message_schema .protocol .responses.request .token_protocol .tool_schema"
    ),
    "vlm_server.file_protocol": ".message_schema",
    "vlm_server.files": ".errors .finishing .sessions.store vision.image vision.media_budgets",
    "vlm_server.finishing": "",
    "vlm_server.flags": (
        ".alpaca .answer_formats .config .parsing.reasoning .parsing.tool_formats engine.config engine.log_lines vision.config"
    ),
    "vlm_server.format_protocol": ".message_schema",
    "vlm_server.generate_protocol": ".aborting .image_protocol .message_schema .protocol",
    "vlm_server.generate_shape": ".errors .generation .stage_timings .streaming",
    "vlm_server.generation": (
        ".aborting .backend .detokenizer .errors .metrics .parsing.answer .parsing.events .protocol .sampling .stage_timings engine.request"
    ),
    "vlm_server.gradio_page": ".chat_client",
    "vlm_server.grammar_pool": (
        ".errors .grammar_worker engine.guided vision.budget vision.frames vision.media_budgets vision.shared_array vision.workers"
    ),
    "vlm_server.grammar_worker": "engine.guided vision.frames vision.worker_start",
    "vlm_server.guided": ".backend .errors .format_protocol .protocol engine.guided",
    "vlm_server.image_protocol": "vision.resolution",
    "vlm_server.infill": ".backend",
    "vlm_server.interactive_protocol": ".image_protocol .message_schema .protocol",
    "vlm_server.internlm_tools": "",
    "vlm_server.jinja_process": ".jinja_worker vision.workers",
    "vlm_server.jinja_worker": "vision.confinement vision.worker_start",
    "vlm_server.json_body": ".config .errors .nesting",
    "vlm_server.logprobs": "engine.request",
    "vlm_server.loop_lag": "",
    "vlm_server.message_schema": ".image_protocol .nesting",
    "vlm_server.metered_engine": ".backend .metering engine.request",
    "vlm_server.metering": ".quotas engine.request",
    "vlm_server.metrics": "engine.request vision.budget vision.service",
    "vlm_server.middleware": ".errors .metrics .stage_timings .tracing",
    "vlm_server.nesting": "",
    "vlm_server.parsing": "",
    "vlm_server.parsing.answer": ".parsing.calls .parsing.events .parsing.reasoning",
    "vlm_server.parsing.calls": ".parsing.events .parsing.scanner",
    "vlm_server.parsing.events": "",
    "vlm_server.parsing.reasoning": ".parsing.events .parsing.scanner",
    "vlm_server.parsing.scanner": "",
    "vlm_server.parsing.tool_formats": ".parsing.calls .parsing.scanner",
    "vlm_server.picture_loading": ".announcing .metering .picture_report .stage_timings engine.request vision.image vision.request_room",
    "vlm_server.picture_parts": ".chat_template engine.request vision.config vision.families vision.image",
    "vlm_server.picture_places": ".tokenizer engine.request vision.families",
    "vlm_server.picture_report": "vision.image",
    "vlm_server.pipeline": (
        ".announcing .chat_template .detokenizer .jinja_process .picture_loading .picture_parts .picture_places .picture_report "
        ".prompt_tokens .stage_timings .template_choice .tokenizer .transcript engine.request vision.config vision.families vision.image "
        "vision.budget vision.media_budgets vision.request_room"
    ),
    "vlm_server.probe": (
        ".chat_template .jinja_process .pipeline .readiness .stage_timings engine.request vision.image vision.request_room vision.workers"
    ),
    "vlm_server.prompt_tokens": ".chat_template .tokenizer .transcript engine.request vision.families vision.image",
    "vlm_server.protocol": ".config .format_protocol .image_protocol .message_schema .nesting .tool_schema",
    "vlm_server.queued_tokens": ".backend engine.request vision.budget vision.media_budgets",
    "vlm_server.quotas": "",
    "vlm_server.readiness": "",
    "vlm_server.request_limits": (
        ".alpaca_protocol .config .embedding_protocol .errors .format_protocol .generate_protocol .interactive_protocol .message_schema "
        ".protocol .token_protocol"
    ),
    "vlm_server.response_schema": ".error_codes",
    "vlm_server.responses": "",
    "vlm_server.responses.field_paths": ".errors engine.request vision.image",
    "vlm_server.responses.items": ".message_schema",
    "vlm_server.responses.output": ".parsing.events .responses.items .responses.token_texts",
    "vlm_server.responses.records": ".sessions.store vision.media_budgets",
    "vlm_server.responses.request": ".format_protocol .image_protocol .message_schema .nesting .protocol .responses.items .tool_schema",
    "vlm_server.responses.schema": ".format_protocol .response_schema .responses.items .responses.request",
    "vlm_server.responses.shape": (
        ".backend .errors .generation .logprobs .responses.field_paths .responses.output .responses.request .sampling .stage_timings "
        ".streaming"
    ),
    "vlm_server.responses.token_texts": "",
    "vlm_server.responses.translation": ".errors .format_protocol .protocol .responses.field_paths .responses.items .responses.request",
    "vlm_server.role_template": ".chat_template",
    "vlm_server.routes": "",
    "vlm_server.routes.abort": ".aborting .auth .context .errors .field_rules .generate_protocol .json_body",
    "vlm_server.routes.alpaca": (
        ".aborting .alpaca .alpaca_protocol .alpaca_shapes .auth .context .embedding_protocol .field_rules .generation .guided "
        ".json_body .middleware .protocol .request_limits .routes.embeddings .shapes .streaming"
    ),
    "vlm_server.routes.chat": ".chats .context .json_body .middleware .protocol .response_schema .shapes .streaming",
    "vlm_server.routes.completions": (
        ".aborting .auth .context .echo .errors .generation .guided .infill .json_body .middleware .protocol .response_schema .shapes "
        ".streaming engine.request"
    ),
    "vlm_server.routes.control": ".context .errors .response_schema",
    "vlm_server.routes.embeddings": (
        ".auth .context .embedding_protocol .errors .files .json_body .middleware .response_schema .shapes .stage_timings .streaming "
        "engine.request vision.request_room"
    ),
    "vlm_server.routes.files": (
        ".auth .config .context .errors .field_rules .file_protocol .files .response_schema .streaming .uploads vision.image"
    ),
    "vlm_server.routes.generate": (
        ".aborting .auth .context .errors .generate_protocol .generate_shape .generation .guided .json_body .middleware .picture_report "
        ".response_schema .shapes .streaming engine.request"
    ),
    "vlm_server.routes.health": ".auth .context .errors .metrics .readiness .response_schema .sessions.store .streaming engine.request",
    "vlm_server.routes.interactive": (
        ".auth .context .errors .generation .interactive_protocol .json_body .middleware .picture_report .response_schema "
        ".sessions.store .shapes .stage_timings .streaming .turns .waiting_room engine.request"
    ),
    "vlm_server.routes.messages": (
        ".anthropic.field_names .anthropic.models .anthropic.protocol .anthropic.response_schema .anthropic.shapes .anthropic.translation "
        ".chats .context .errors .field_rules .json_body .middleware .streaming engine.request vision.image"
    ),
    "vlm_server.routes.models": ".anthropic.models .context .errors .response_schema",
    "vlm_server.routes.responses": (
        ".aborting .auth .chats .context .errors .json_body .middleware .responses.items .responses.records .responses.request "
        ".responses.schema .responses.shape .responses.translation .sessions.store .streaming"
    ),
    "vlm_server.routes.scoring": (
        ".auth .context .errors .json_body .middleware .response_schema .shapes .streaming .token_protocol engine.request"
    ),
    "vlm_server.routes.status": ".context .readiness .response_schema .status_board .streaming vlm_server",
    "vlm_server.routes.tokens": (
        ".auth .context .errors .files .json_body .picture_report .response_schema .streaming .token_protocol .tools"
    ),
    "vlm_server.sampling": ".errors .protocol engine.request",
    "vlm_server.serving": (
        ".api_keys .app .auth .backend .config .connections .readiness .sessions.opening .sessions.store .tls engine.garbage "
        "engine.log_lines engine.request"
    ),
    "vlm_server.sessions": "",
    "vlm_server.sessions.history": ".sessions.lease .sessions.store .transcript vision.media_budgets",
    "vlm_server.sessions.lease": ".finishing .sessions.store",
    "vlm_server.sessions.opening": ".sessions.redis_store .sessions.sqlite_store .sessions.store",
    "vlm_server.sessions.redis_store": ".sessions.store",
    "vlm_server.sessions.sqlite_store": ".sessions.store",
    "vlm_server.sessions.store": "",
    "vlm_server.shapes": ".backend .echo .errors .generation .logprobs .parsing.events .protocol .stage_timings .streaming engine.request",
    "vlm_server.stage_timings": "",
    "vlm_server.stage_totals": ".backend engine.request",
    "vlm_server.status_board": ".backend .stage_totals engine.request vision.service vision.single_flight",
    "vlm_server.streaming": ".errors .generation .middleware",
    "vlm_server.template_choice": ".built_in_templates .chat_template .jinja_process .role_template",
    "vlm_server.terminal": ".chat_client",
    "vlm_server.tls": "",
    "vlm_server.token_protocol": ".image_protocol .message_schema .protocol .tool_schema",
    "vlm_server.tokenizer": "vision",
    "vlm_server.tool_schema": ".config .message_schema .nesting",
    "vlm_server.tools": (
        ".answer_formats .errors .parsing.answer .parsing.calls .parsing.reasoning .parsing.tool_formats .protocol .tool_schema"
    ),
    "vlm_server.tracing": ".stage_timings vlm_server",
    "vlm_server.transcript": "engine.request",
    "vlm_server.turns": (
        ".backend .config .errors .generation .picture_report .request_limits .sessions.history .sessions.store .stage_timings "
        "engine.request vision.image"
    ),
    "vlm_server.uploads": ".errors .file_protocol vision.image",
    "vlm_server.waiting_room": ".auth .backend .errors .middleware engine.request",
}

# Whole packages that a package never imports, whatever the table says: vision knows neither other package, the engine no server.
NEVER = {"vision": {"engine", "vlm_server"}, "engine": {"vlm_server"}, "vlm_server": set()}

# Bookkeeping, the engine's client, the decode worker and the grammar worker start without torch.
WITHOUT_TORCH = (
    "engine.request",
    "engine.config",
    "engine.kv_cache",
    "engine.scheduler",
    "engine.client",
    "vision.decode",
    "vlm_server.grammar_worker",
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imports(tree: ast.AST, *, module: str, is_package: bool) -> Iterator[str]:
    """Our modules that a syntax tree names in its imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")[: None if is_package and node.level == 1 else -node.level + is_package]
                base = ".".join([*parts, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in PACKAGES)


def imports_of(module: str) -> set[str]:
    path = MODULES[module]
    return set(imports(ast.parse(path.read_text()), module=module, is_package=path.name == "__init__.py")) - {module}


def allowed_for(module: str) -> set[str]:
    package = module.split(".")[0]
    names = [package + name if name.startswith(".") else name for name in MAY_IMPORT[module].split()]
    folders = tuple(name.removesuffix("*") for name in names if name.endswith(".*"))
    return set(names) | {other for other in MODULES if folders and other.startswith(folders)}


def test_every_module_is_in_the_table_and_every_entry_is_a_module() -> None:
    assert sorted(MODULES) == sorted(MAY_IMPORT), "add new modules to MAY_IMPORT and remove those that are gone"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_the_table_allows(module: str) -> None:
    if module in MAY_IMPORT:
        assert imports_of(module) - allowed_for(module) == set(), f"arrows from {module} that MAY_IMPORT does not have"


def test_the_table_names_only_modules_that_exist() -> None:
    named = {name for module in MAY_IMPORT for name in allowed_for(module) if not name.endswith(".*")}

    assert named - set(MODULES) == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_keep_their_distance(package: str) -> None:
    imported = {name.split(".")[0] for module in MODULES if module.split(".")[0] == package for name in imports_of(module)}

    assert imported & NEVER[package] == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    arrows = {module: {name for name in imports_of(module) if name in MODULES} for module in MODULES}

    assert find_circle(arrows) is None


def find_circle(arrows: dict[str, set[str]]) -> list[str] | None:
    """Takes away modules that import nothing that is left; what remains, if anything, holds a circle."""
    left = dict(arrows)
    while leaves := [module for module, names in left.items() if not names & set(left)]:
        for module in leaves:
            del left[module]
    if not left:
        return None
    path = [next(iter(left))]
    while len(set(path)) == len(path):
        path.append(min(left[path[-1]] & set(left)))
    return path[path.index(path[-1]) :]


def test_a_circle_would_be_found() -> None:
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_imports_are_found_however_they_are_written() -> None:
    source = "import engine.config as c, os\ndef f():\n  from vision import image\n  from . import request\n  from .layers.linear import x"

    found = set(imports(ast.parse(source), module="engine.core", is_package=False))

    assert found == {"engine.config", "vision.image", "engine.request", "engine.layers.linear"}
    assert set(imports(ast.parse("from .config import x"), module="engine", is_package=True)) == {"engine.config"}
    assert set(imports(ast.parse("from ..request import x"), module="engine.layers", is_package=True)) == {"engine.request"}


def test_bookkeeping_never_loads_torch() -> None:
    """Each module in a fresh interpreter, where nothing else may have loaded it."""
    code = "import importlib, sys; importlib.import_module(sys.argv[1]); sys.exit('torch' in sys.modules)"

    loading = [module for module in WITHOUT_TORCH if subprocess.run([sys.executable, "-c", code, module], cwd=ROOT).returncode]

    assert loading == []
