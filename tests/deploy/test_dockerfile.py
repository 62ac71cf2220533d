from pathlib import Path

import pytest

from deploy.dockerfile import DockerfileError, Instruction, copied_files, expand, health_command, is_ignored, pairs, parse, words

CLONE = Path(__file__).parent.parent.parent


def test_continued_lines_are_joined_and_comments_left_out() -> None:
    text = "FROM debian:x\n# a comment\nRUN one \\\n# between\n && two\n\nexpose 80\n"

    assert parse(text) == [Instruction("FROM", "debian:x"), Instruction("RUN", "one && two"), Instruction("EXPOSE", "80")]


@pytest.mark.parametrize("line", ["ONBUILD RUN true", "ADD https://example.org/x /x", "RUN <<EOF"])
def test_what_is_not_understood_is_an_error(line: str) -> None:
    with pytest.raises(DockerfileError):
        parse(line)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/whl/${VARIANT}", "/whl/cpu"),
        ("$VARIANT/bin", "cpu/bin"),
        ("${MISSING:-other}", "other"),
        ("${MISSING:+x}${VARIANT:+--extra ${VARIANT}}", "--extra cpu"),
        ("$MISSING", ""),
    ],
)
def test_variables_are_replaced_as_docker_does(text: str, expected: str) -> None:
    assert expand(text, {"VARIANT": "cpu"}) == expected


def test_commands_have_two_forms() -> None:
    assert words('["python", "x y.py"]') == ["python", "x y.py"]
    assert words("echo a b") == ["/bin/sh", "-c", "echo a b"]
    assert health_command('--interval=10s --retries=3 CMD ["true"]') == ["true"]
    assert pairs('A=1 B="two words"') == {"A": "1", "B": "two words"}


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("engine/core.py", False),
        ("engine/__pycache__/core.pyc", True),
        ("tests/x.py", True),
        ("docs/kept.md", False),
        ("docs/dropped.md", True),
    ],
)
def test_the_last_ignore_pattern_that_matches_decides(path: str, ignored: bool) -> None:
    assert is_ignored(path, ["*", "!engine", "!docs/kept.md", "**/__pycache__"]) is ignored


def test_every_copy_of_our_dockerfile_finds_files_and_no_cache_or_test_among_them() -> None:
    patterns = (CLONE / ".dockerignore").read_text().splitlines()
    copies = [instruction.text.split()[:-1] for instruction in parse((CLONE / "Dockerfile").read_text()) if instruction.name == "COPY"]

    names = {path.relative_to(CLONE).as_posix() for sources in copies for path in copied_files(CLONE, sources, patterns)}

    assert {"constraints.txt", "vlm_server/cli.py", "assets/demo_model/weights.safetensors", "deploy/entrypoint.sh"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(("tests/", ".venv/", ".git/"))]


def test_copying_what_is_not_there_is_an_error() -> None:
    with pytest.raises(DockerfileError, match="no such file"):
        copied_files(CLONE, ["no_such_folder"], [])
