"""HTTPS: with certificates made for the test, towards our own clients, and every mistake in the files."""

import asyncio
import socket
import ssl
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest
import requests
import trustme
import uvicorn
from cryptography.hazmat.primitives import serialization

from deploy import healthcheck
from tests.contract.fake_engine import FakeBackend
from tests.contract.running import MODEL, RunningServer, fake_config
from vlm_server.app import create_app
from vlm_server.chat_client import ChatError, ChatServer
from vlm_server.cli import main
from vlm_server.client import APIClient, AsyncAPIClient, get_model_list
from vlm_server.serving import _uvicorn_config
from vlm_server.tls import TlsError, TlsFiles, tls_files

PASSWORD = "correct horse"
HELLO = [{"role": "user", "content": "hi"}]


class Certificates:
    """A CA and a certificate for loopback, as files."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1", "localhost")
        self.trusted = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(self.trusted)
        self.certificate, self.key, self.both = str(folder / "cert.pem"), str(folder / "key.pem"), str(folder / "both.pem")
        issued.cert_chain_pems[0].write_to_path(self.certificate)
        issued.private_key_pem.write_to_path(self.key)
        issued.private_key_and_cert_chain_pem.write_to_path(self.both)
        self.encrypted = str(folder / "encrypted.pem")
        key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
        encryption = serialization.BestAvailableEncryption(PASSWORD.encode())
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        Path(self.encrypted).write_bytes(pem)
        self.foreign_key = str(folder / "foreign.pem")
        authority.issue_cert("localhost").private_key_pem.write_to_path(self.foreign_key)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


@contextmanager
def serving(tls: TlsFiles) -> Iterator[str]:
    """The scripted engine behind the server's own settings of uvicorn."""
    config = fake_config(tls=tls)
    server = uvicorn.Server(_uvicorn_config(create_app(config, open_backend=FakeBackend().open), config))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    try:
        yield f"https://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def url(files: Certificates) -> Iterator[str]:
    with serving(TlsFiles(files.certificate, files.key)) as url:
        yield url


def test_the_api_client_speaks_to_a_server_whose_certificate_it_is_told_to_trust(url: str, files: Certificates) -> None:
    client = APIClient(url, verify=files.trusted)

    [answer] = client.chat_completions_v1(model=MODEL, messages=HELLO)
    chunks = list(client.chat_completions_v1(model=MODEL, messages=HELLO, stream=True))

    assert client.available_models == [MODEL]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert len(chunks) > 2
    assert client.encode("abc", add_bos=False)[1] == 3


async def test_the_asynchronous_client_trusts_what_it_is_told_to(url: str, files: Certificates) -> None:
    assert await AsyncAPIClient(url, verify=files.trusted).available_models == [MODEL]
    assert await AsyncAPIClient(url, verify=False).available_models == [MODEL]
    with pytest.raises(aiohttp.ClientSSLError):
        await AsyncAPIClient(url).available_models


def test_the_api_client_trusts_what_the_environment_names(url: str, files: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(requests.exceptions.SSLError):
        get_model_list(f"{url}/v1/models")

    monkeypatch.setenv("REQUESTS_CA_BUNDLE", files.trusted)

    assert get_model_list(f"{url}/v1/models") == [MODEL]


async def test_the_chat_clients_speak_to_a_server_whose_certificate_they_are_told_to_trust(url: str, files: Certificates) -> None:
    server = ChatServer(url, ca_file=files.trusted)

    models = await asyncio.to_thread(server.models)
    blocking = await asyncio.to_thread(lambda: "".join(piece.text for piece in server.answer(MODEL, HELLO)))
    pieces = [piece.text async for piece in server.answer_async(MODEL, HELLO)]

    assert models == [MODEL]
    assert blocking == "".join(pieces) != ""


async def test_the_chat_clients_say_what_to_do_about_a_certificate_that_is_not_trusted(url: str) -> None:
    server = ChatServer(url)

    with pytest.raises(ChatError, match="--cafile"):
        await asyncio.to_thread(server.models)
    with pytest.raises(ChatError, match="--cafile"):
        [piece async for piece in server.answer_async(MODEL, HELLO)]


def test_a_file_without_certificates_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing")
    for name in ("empty.pem", "none.pem"):
        with pytest.raises(ChatError, match=name):
            ChatServer("https://localhost", ca_file=str(tmp_path / name))


def end_of_input(*words: str) -> str:
    raise EOFError


def test_the_command_takes_its_trusted_certificates_from_flag_or_environment(
    url: str, files: Certificates, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.input", end_of_input)

    assert main(["chat", url]) == 1
    assert "--cafile" in capsys.readouterr().err
    assert main(["chat", url, "--cafile", files.trusted]) == 0
    monkeypatch.setenv("SSL_CERT_FILE", files.trusted)
    assert main(["chat", url]) == 0


def handshake(url: str, files: Certificates, version: ssl.TLSVersion) -> str | None:
    """The version that server and client agree on."""
    context = ssl.create_default_context(cafile=files.trusted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # old versions are what is asked for
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = version
    host, port = url.removeprefix("https://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as plain, context.wrap_socket(plain, server_hostname=host) as secure:
        return secure.version()


def test_tls_1_2_and_1_3_are_spoken_and_nothing_older(url: str, files: Certificates) -> None:
    assert handshake(url, files, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    assert handshake(url, files, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(url, files, ssl.TLSVersion.TLSv1_1)
    config = fake_config(tls=TlsFiles(files.certificate, files.key))
    context = _uvicorn_config(create_app(config), config).ssl
    assert context is not None
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_the_containers_health_check_asks_either_way(
    url: str, server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healthcheck, "PORT_FILE", tmp_path / "port")
    for where in (url, server.url):
        (tmp_path / "port").write_text(where.rpartition(":")[2])
        assert healthcheck.main() == 0
    server.backend.engine.state = "failed"
    assert healthcheck.main() == 1
    (tmp_path / "port").write_text("1")
    assert healthcheck.main() == 1


def test_plain_http_is_not_answered_on_the_port(url: str) -> None:
    with pytest.raises(requests.ConnectionError):
        requests.get(url.replace("https", "http"), timeout=10)


@pytest.mark.parametrize("kind", ["both in one file", "encrypted key"])
def test_keys_in_the_certificates_file_and_behind_a_password_work(files: Certificates, kind: str) -> None:
    tls = TlsFiles(files.both) if kind == "both in one file" else TlsFiles(files.certificate, files.encrypted, PASSWORD)
    tls.check()

    with serving(tls) as url:
        assert requests.get(f"{url}/health", verify=files.trusted, timeout=10).status_code == 200


def test_files_that_cannot_be_used_are_named_with_the_reason(files: Certificates, tmp_path: Path) -> None:
    (tmp_path / "text.pem").write_text("nothing")
    text, none = str(tmp_path / "text.pem"), str(tmp_path / "none.pem")
    for tls, words in (
        (TlsFiles(none, files.key), f"{none}: it cannot be read: No such file"),
        (TlsFiles(files.certificate, none), f"{none}: it cannot be read: No such file"),
        (TlsFiles(str(tmp_path)), "Is a directory"),
        (TlsFiles(text, files.key), "no certificate and key in PEM"),
        (TlsFiles(files.certificate, text), "no certificate and key in PEM"),
        (TlsFiles(files.certificate), "no certificate and key in PEM"),
        (TlsFiles(files.certificate, files.foreign_key), "the key is not the certificate's"),
        (TlsFiles(files.certificate, files.encrypted), "SSL_KEYFILE_PASSWORD in the environment does not open it"),
        (TlsFiles(files.certificate, files.encrypted, "wrong"), "SSL_KEYFILE_PASSWORD in the environment does not open it"),
    ):
        with pytest.raises(TlsError) as caught:
            tls.check()
        assert words in str(caught.value)
        assert "wrong" not in str(caught.value)
        assert PASSWORD not in repr(tls)


def test_the_files_are_those_of_the_flags_or_with_ssl_those_of_the_environment() -> None:
    environment = {"SSL_CERTFILE": "env.pem", "SSL_KEYFILE": "env.key", "SSL_KEYFILE_PASSWORD": "p"}

    def found(certfile: str | None, keyfile: str | None, flag: bool | None) -> TlsFiles | None:
        return tls_files(certfile, keyfile, from_environment=flag, environment=environment)

    assert found(None, None, None) is None
    assert found(None, None, False) is None
    assert found(None, None, True) == TlsFiles("env.pem", "env.key", "p")
    assert found("c.pem", "k.pem", True) == found("c.pem", "k.pem", None) == TlsFiles("c.pem", "k.pem", "p")
    assert found("c.pem", None, True) == TlsFiles("c.pem", None, "p")


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["--ssl"], {}, "--ssl: SSL_CERTFILE and SSL_KEYFILE in the environment must name the files"),
        (["--ssl"], {"SSL_CERTFILE": "c.pem"}, "--ssl: SSL_CERTFILE and SSL_KEYFILE"),
        (["--ssl-keyfile", "k.pem"], {}, "--ssl-keyfile: --ssl-certfile is needed too"),
        (["--no-ssl", "--ssl-certfile", "c.pem"], {}, "--no-ssl: it contradicts"),
        (["--ssl-certfile", "/no/such.pem"], {}, "/no/such.pem: it cannot be read"),
    ],
)
def test_a_mistake_ends_the_start_with_one_line_before_anything_is_loaded(
    words: list[str], environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("SSL_CERTFILE", "SSL_KEYFILE", "SSL_KEYFILE_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert main(["serve", "/no/such/folder", *words]) == 1

    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"vlm-server: {message}")
