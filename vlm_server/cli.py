"""`vlm-server`: serve, check_env. Heavy imports happen in the commands, so that help and mistakes are quick."""

import argparse
import logging
import sys
from collections.abc import Sequence

from vlm_server import __version__
from vlm_server.config import ServerConfig
from vlm_server.flags import add_serve_flags, normalized, values_for

logger = logging.getLogger(__name__)

_LEGACY_WORD = "api_server"  # lmdeploy serve api_server MODEL


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parsed = parse(sys.argv[1:] if arguments is None else arguments)
    command = {"serve": _serve, "check_env": _check_env}[parsed.command]
    return command(parsed)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command and its flags. Exits with a message where they are wrong."""
    return _parser().parse_args(_without_legacy_word(normalized(arguments)))


def server_config(parsed: argparse.Namespace) -> ServerConfig:
    """The settings that the flags make; finds, downloads or assembles the checkpoint. Raises CheckpointError or ValueError."""
    from engine.config import EngineConfig
    from vision.config import VisionConfig
    from vlm_server.checkpoint import find_checkpoint
    from vlm_server.template_choice import read_chosen

    read_chosen(parsed.chat_template, parsed.chat_template_args, parsed.meta_instruction)  # a mistake is known before a download
    checkpoint = find_checkpoint(
        parsed.model, revision=parsed.revision, download_dir=parsed.download_dir, trust_remote_code=parsed.trust_remote_code
    )
    engine = EngineConfig(model_folder=checkpoint.path, **values_for("engine", parsed))
    return ServerConfig(
        engine=engine.resolve(checkpoint.text_config(trust_remote_code=parsed.trust_remote_code)),
        vision=VisionConfig(**values_for("vision", parsed)),
        model_name=parsed.model_name or checkpoint.name,
        model_root=checkpoint.root,
        **values_for("server", parsed),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlm-server", description="An OpenAI-compatible server for image-text models.")
    parser.add_argument("-v", "--version", action="version", version=f"vlm-server {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve a model over HTTP", description=_serve.__doc__, allow_abbrev=False)
    serve.add_argument("model", nargs="?", metavar="MODEL", help="folder, hub id or GGUF file (default: the embedded demonstration model)")
    add_serve_flags(serve)
    check_env = commands.add_parser("check_env", aliases=["check-env"], help="print what this machine and installation have")
    check_env.add_argument("--dump-file", metavar="FILE", help="write it as JSON too")
    check_env.set_defaults(command="check_env")
    return parser


def _without_legacy_word(arguments: list[str]) -> list[str]:
    """`serve api_server MODEL …` is `serve MODEL …`; so are LMDeploy's switches that only say no."""
    words = [_LEGACY_SWITCHES.get(argument, argument) for argument in arguments]
    return ["serve", *words[2:]] if words[:2] == ["serve", _LEGACY_WORD] else words


_LEGACY_SWITCHES = {"--disable-metrics": "--no-metrics", "--disable-fastapi-docs": "--no-fastapi-docs"}


def _serve(parsed: argparse.Namespace) -> int:
    """Serve a model over HTTP. Flags take - and _ alike."""
    _set_up_logging(parsed.log_level)
    from vlm_server.checkpoint import CheckpointError
    from vlm_server.serving import ServingError, serve

    try:
        serve(server_config(parsed))
    except (CheckpointError, ServingError, ValueError) as error:
        print(f"vlm-server: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _set_up_logging(level: str) -> None:
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("sse_starlette", "httpx2", "uvicorn"):  # they log every answer's text at debug, each file of a download, each start
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
