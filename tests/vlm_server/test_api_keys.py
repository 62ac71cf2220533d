"""Keys from flags, environment and files, and every mistake in them."""

import hashlib
import os
from pathlib import Path

import pytest

from vlm_server.api_keys import ApiKeysError, digest_of, is_open_to_others, key_sources, load_keys
from vlm_server.quotas import Limits

EXAMPLE = Path(__file__).parents[2] / "deploy" / "api-keys.example.toml"


def file_with(folder: Path, text: str) -> str:
    (folder / "keys.toml").write_text(text)
    return str(folder / "keys.toml")


def entry(**fields: str) -> str:
    return "[[keys]]\n" + "".join(f"{name} = {value}\n" for name, value in fields.items())


def test_plain_keys_are_named_by_their_place_and_unlimited() -> None:
    first, second = load_keys(["a", "b", "a"], [])

    assert [(key.name, key.limits) for key in (first, second)] == [("key-1", Limits()), ("key-2", Limits())]
    assert first.digest == hashlib.sha256(b"a").digest()


def test_a_file_has_names_keys_or_digests_and_limits(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"secret-2").hexdigest()
    text = entry(name='"alice"', key='"secret-1"', requests_per_minute="60", tokens_per_minute="1000", megapixels_per_minute="2.5")
    text += entry(name='"bob"', key_sha256=f'"{digest.upper()}"', megapixels_per_minute="3")

    alice, bob, plain = sorted(load_keys(["plain"], [file_with(tmp_path, text)]), key=lambda key: key.name)

    assert (alice.digest, alice.limits) == (digest_of("secret-1"), Limits(60, 1000, 2_500_000))
    assert (bob.digest, bob.limits) == (digest_of("secret-2"), Limits(pixels=3_000_000))
    assert plain.name == "key-1"


def test_the_example_file_can_be_used() -> None:
    keys = load_keys([], [str(EXAMPLE)])

    assert {"requests", "tokens", "megapixels"} == set(keys[0].limits.by_kind())
    assert keys[-1].digest == digest_of("replace-this-too")
    assert all(key.is_guessable for key in keys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it has no entry [[keys]]"),
        ("keys = []", "it has no entry [[keys]]"),
        ("keys = 3", "it has no entry [[keys]]"),
        ("[keys]\nname = 'a'", "it has no entry [[keys]]"),
        ("keys = ['hush']", "keys entry 1: it is no table"),
        ("keys = [", "it is not TOML, seen at end of document"),
        ("keys = " + "9" * 5000, "it holds a number of thousands of digits"),
        ("[[keys]]\nkey = hush", "it is not TOML, seen at line 2, column 7"),
        ("version = 1\n" + entry(name='"a"', key='"hush"'), "'version' is not known"),
        (entry(key='"hush"'), "keys entry 1: name: a string"),
        (entry(name='""', key='"hush"'), "name: a string"),
        (entry(name='"a b"', key='"hush"'), "name: a string"),
        (entry(name='"a\\n"', key='"hush"'), "name: a string"),
        (entry(name="3", key='"hush"'), "name: a string"),
        (entry(name='"a"'), "keys entry 1 (a): exactly one of key and key_sha256"),
        (entry(name='"a"', key='"hush"', key_sha256=f'"{"0" * 64}"'), "exactly one of key and key_sha256"),
        (entry(name='"a"', key="3"), "(a): key: a string of visible ASCII"),
        (entry(name='"a"', key='""'), "key: a string of visible ASCII"),
        (entry(name='"a"', key='"hush hush"'), "key: a string of visible ASCII"),
        (entry(name='"a"', key='"hüsh"'), "key: a string of visible ASCII"),
        (entry(name='"a"', key_sha256='"hush"'), "key_sha256: a string of 64 hexadecimal digits"),
        (entry(name='"a"', key='"hush"', requests_per_minute="0"), "requests_per_minute: a whole number above 0"),
        (entry(name='"a"', key='"hush"', requests_per_minute="1.5"), "requests_per_minute: a whole number"),
        (entry(name='"a"', key='"hush"', tokens_per_minute="true"), "tokens_per_minute: a whole number"),
        (entry(name='"a"', key='"hush"', tokens_per_minute='"9"'), "tokens_per_minute: a whole number"),
        (entry(name='"a"', key='"hush"', megapixels_per_minute="nan"), "megapixels_per_minute: a number above 0"),
        (entry(name='"a"', key='"hush"', megapixels_per_minute="inf"), "megapixels_per_minute: a number above 0"),
        (entry(name='"a"', key='"hush"', megapixels_per_minute="-1"), "megapixels_per_minute: a number above 0"),
        (entry(name='"a"', key='"hush"', max_concurrent="1"), "'max_concurrent' is not known"),
        (entry(name='"a"', key='"x"') + entry(name='"a"', key='"hush"'), "keys entry 2 (a): the name 'a' is that of"),
        (entry(name='"a"', key='"hush"') + entry(name='"b"', key='"hush"'), "keys entry 2 (b): it is the same key as"),
    ],
)
def test_a_mistake_names_file_and_entry_and_shows_no_key(tmp_path: Path, text: str, words: str) -> None:
    file = file_with(tmp_path, text)

    with pytest.raises(ApiKeysError) as caught:
        load_keys([], [file])

    assert str(caught.value).startswith(f"{file}: ")
    assert words in str(caught.value)
    assert "hush" not in str(caught.value)
    assert "hüsh" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"# \xff")
    os.mkfifo(tmp_path / "pipe")
    reasons = {"none": "there is no such file", ".": "no regular file", "pipe": "no regular file", "latin.toml": "not UTF-8"}
    for name, reason in reasons.items():
        with pytest.raises(ApiKeysError) as caught:
            load_keys([], [str(tmp_path / name)])
        assert str(caught.value).startswith(str(tmp_path / name).removesuffix("/."))
        assert reason in str(caught.value)


def test_a_key_of_the_command_line_that_no_header_can_carry_is_refused_without_being_shown() -> None:
    for word in ("hush hush", "hüsh", "hush\n", ""):
        with pytest.raises(ApiKeysError) as caught:
            load_keys(["good", word], [])
        assert "--api-keys: key 2: only visible ASCII" in str(caught.value)
        assert "sh" not in str(caught.value).replace("visible", "")


def test_a_key_or_name_of_two_sources_is_refused(tmp_path: Path) -> None:
    same_key = file_with(tmp_path, entry(name='"a"', key='"hush"'))
    with pytest.raises(ApiKeysError, match=r"\(a\): it is the same key as --api-keys: key 1"):
        load_keys(["hush"], [same_key])
    with pytest.raises(ApiKeysError, match="the name 'a' is that of"):
        load_keys([], [same_key, same_key])


def test_a_word_is_a_file_only_behind_its_mark() -> None:
    assert key_sources(["k", "@/run/keys", "/run/keys"], ["more"], None) == (["k", "/run/keys"], ["/run/keys", "more"])
    assert key_sources(None, None, None) == ([], [])


def test_the_environment_gives_keys_and_no_files() -> None:
    assert key_sources(["a"], None, " b\nc ") == (["a", "b", "c"], [])
    with pytest.raises(ApiKeysError, match="VLM_SERVER_API_KEYS: it takes keys"):
        key_sources(None, None, "@/run/keys")


@pytest.mark.parametrize(
    ("words", "files", "environment", "name"),
    [([], None, None, "--api-keys:"), (None, [], None, "--api-keys-file:"), (None, None, " ", "VLM_SERVER_API_KEYS:")],
)
def test_a_source_that_is_given_and_empty_opens_no_server(
    words: list[str] | None, files: list[str] | None, environment: str | None, name: str
) -> None:
    with pytest.raises(ApiKeysError, match=f"^{name}"):
        key_sources(words, files, environment)


def test_a_file_is_open_to_others_where_they_may_read_or_change_it(tmp_path: Path) -> None:
    file = Path(file_with(tmp_path, ""))
    for mode, is_open in ((0o600, False), (0o640, False), (0o644, True), (0o602, True)):
        file.chmod(mode)
        assert is_open_to_others(str(file)) is is_open
