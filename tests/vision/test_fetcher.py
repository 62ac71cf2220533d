import asyncio
import gzip
import os
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from yarl import URL

from tests.vision.picture_server import Gate, PictureServer, body, in_turn, redirect_to
from tests.vision.pictures import data_url, png
from tests.vision.processes import num_descriptors, until
from vision.config import VisionConfig
from vision.connector import MAX_IDLE_CONNECTIONS
from vision.fetcher import Fetcher
from vision.image import MediaError
from vision.urls import MAX_URL_CHARACTERS, redirected


@pytest.fixture
async def server() -> AsyncIterator[PictureServer]:
    server = PictureServer()
    await server.open()
    yield server
    await server.close()


@pytest.fixture
async def fetcher() -> AsyncIterator[Fetcher]:
    fetcher = unopened()
    await fetcher.open()
    yield fetcher
    await fetcher.close()


def unopened(**limits: Any) -> Fetcher:
    """One that may dial this machine, where the tests' servers are, and where every name leads."""

    async def look_up(host: str) -> list[str]:
        return ["127.0.0.1"]

    return Fetcher(VisionConfig(**({"allow_private_media": ("127.0.0.0/8",), "retry_pause_s": 0.0} | limits)), look_up=look_up)


async def refusal(fetcher: Fetcher, url: str) -> MediaError:
    """Why an unopened fetcher refuses the URL."""
    await fetcher.open()
    try:
        with pytest.raises(MediaError) as caught:
            await fetcher.fetch(url)
    finally:
        await fetcher.close()
    return caught.value


async def test_a_picture_is_fetched_and_the_client_names_itself(server: PictureServer, fetcher: Fetcher) -> None:
    assert await fetcher.fetch(server.url()) == png()

    (request,) = server.requests
    assert "vlm-server" in request.headers["User-Agent"]
    assert request.headers["Accept-Encoding"] == "identity"


async def test_loopback_is_refused_unless_it_is_opened(server: PictureServer) -> None:
    error = await refusal(Fetcher(VisionConfig()), server.url())

    assert error.code == "url_blocked"
    assert server.requests == []


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f.1", "0177.0.0.1", "127.1", "127.0.0.1.", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "１２７.0.0.1"]
)
async def test_no_spelling_of_loopback_reaches_it(server: PictureServer, host: str) -> None:
    error = await refusal(Fetcher(VisionConfig()), server.url(host=host))

    assert error.code == "url_blocked"
    assert server.requests == []


async def test_a_name_that_leads_to_a_private_address_is_refused(server: PictureServer) -> None:
    async def look_up(host: str) -> list[str]:
        return ["127.0.0.1", "10.0.0.1", "::1"]

    error = await refusal(Fetcher(VisionConfig(), look_up=look_up), server.url(host="innocent.example"))

    assert error.code == "url_blocked"
    assert server.requests == []


async def test_the_checked_address_is_the_one_dialled(server: PictureServer) -> None:
    answers = [["127.0.0.1"], ["127.0.0.2"]]  # the second look-up would lead elsewhere

    async def look_up(host: str) -> list[str]:
        return answers.pop(0)

    fetcher = Fetcher(VisionConfig(allow_private_media=("127.0.0.1/32",)), look_up=look_up)
    await fetcher.open()

    assert await fetcher.fetch(server.url(host="rebind.example")) == png()
    assert len(answers) == 1, "one look-up, whose answer was checked and dialled"
    assert server.requests[0].host == f"rebind.example:{server.port}"
    await fetcher.close()


async def test_names_that_lead_to_an_opened_network_are_fetched(server: PictureServer, fetcher: Fetcher) -> None:
    assert await fetcher.fetch(server.url(host="intranet.example")) == png()


async def test_a_name_without_an_address_is_a_failed_fetch() -> None:
    async def look_up(host: str) -> list[str]:
        raise OSError("no such name")

    assert (await refusal(Fetcher(VisionConfig(), look_up=look_up), "http://nowhere.example/")).code == "image_fetch_failed"


async def test_redirects_are_followed(server: PictureServer, fetcher: Fetcher) -> None:
    server.pages |= {"/a": redirect_to("/b?x=1"), "/b": redirect_to(server.url("/c", host="other.example")), "/c": redirect_to("picture")}

    assert await fetcher.fetch(server.url("/a")) == png()
    assert [request.path_qs for request in server.requests] == ["/a", "/b?x=1", "/c", "/picture"]


async def test_more_redirects_than_allowed_are_refused(server: PictureServer) -> None:
    server.pages["/loop"] = redirect_to("/loop")

    error = await refusal(unopened(), server.url("/loop"))

    assert (error.code, error.message) == ("image_fetch_failed", "the picture's URL redirects more than 3 times")
    assert len(server.requests) == 4


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost", "[::1]", "169.254.169.254", "2130706434", "0x7f000002"])
async def test_redirects_to_private_addresses_are_refused(server: PictureServer, host: str) -> None:
    async def look_up(host: str) -> list[str]:
        return ["127.0.0.2"]

    server.pages["/away"] = redirect_to(server.url(host=host))
    fetcher = Fetcher(VisionConfig(allow_private_media=("127.0.0.1/32",)), look_up=look_up)

    error = await refusal(fetcher, server.url("/away"))

    assert error.code == "url_blocked"
    assert [request.path for request in server.requests] == ["/away"]


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:image/png;base64,AAAA", "gopher://127.0.0.1"])
async def test_redirects_to_other_schemes_are_refused(server: PictureServer, location: str) -> None:
    server.pages["/away"] = redirect_to(location)

    assert (await refusal(unopened(), server.url("/away"))).code == "url_blocked"


@pytest.mark.parametrize("location", ["", "http://[", "http://a:99999999/"])
async def test_redirects_to_nowhere_are_a_failed_fetch(server: PictureServer, location: str) -> None:
    server.pages["/away"] = redirect_to(location)

    assert (await refusal(unopened(max_redirects=0), server.url("/away"))).code in ("image_fetch_failed", "url_invalid")


@pytest.mark.parametrize(
    "url",
    [
        *("", "picture.png", "/etc/passwd", "ftp://a/b", "javascript:1", "http:", "http://", "http:///a", "http://[::1"),
        *("http://a:99999/", "http://a\\@b/", "http://a/\nb", "file:///a%00b"),
    ],
)
async def test_what_is_not_a_url_is_refused(url: str) -> None:
    assert (await refusal(unopened(), url)).code == "url_invalid"


@pytest.mark.parametrize("host", ["a..example", "a" * 64 + ".example", ".example"])
@pytest.mark.parametrize("media_proxy", [None, "http://127.0.0.1:1"])
async def test_a_host_that_is_no_name_is_not_a_url(host: str, media_proxy: str | None) -> None:
    assert (await refusal(Fetcher(VisionConfig(media_proxy=media_proxy)), f"http://{host}/")).code == "url_invalid"


@pytest.mark.parametrize("prefix", ["http://a/", "HTTPS://a/", "file:///", "http://a/\n"])
async def test_urls_are_bounded_in_length_before_anyone_looks_at_their_letters(prefix: str) -> None:
    error = await refusal(unopened(), prefix.ljust(MAX_URL_CHARACTERS + 1, "a"))

    assert (error.code, f"more than the allowed {MAX_URL_CHARACTERS} characters" in error.message) == ("url_invalid", True)


async def test_the_longest_url_is_asked_for_and_its_letters_count_as_they_are_asked_for(server: PictureServer, fetcher: Fetcher) -> None:
    longest = server.url("/picture?").ljust(MAX_URL_CHARACTERS, "a")

    assert await fetcher.fetch(longest) == png()
    with pytest.raises(MediaError, match="characters"):
        await fetcher.fetch(longest[:-1] + "ü")  # quoted, it is six


async def test_redirects_are_bounded_in_length(server: PictureServer) -> None:
    prefix = server.url("/")
    server.pages["/away"] = redirect_to("/".ljust(MAX_URL_CHARACTERS + 2 - len(prefix), "a"))

    error = await refusal(unopened(), server.url("/away"))

    assert (error.code, "characters" in error.message, len(server.requests)) == ("url_invalid", True, 1)
    with pytest.raises(MediaError, match="characters"):
        redirected(URL(prefix), "//[" + "a" * MAX_URL_CHARACTERS)  # not parsed


async def test_signed_urls_are_asked_for_as_they_were_written(server: PictureServer, fetcher: Fetcher) -> None:
    path = "/picture?sign=a%2Bb%2Fc%3D&x=%7E+1%20"

    await fetcher.fetch(server.url(path))

    assert server.requests[0].raw_path == path


async def test_letters_that_a_url_cannot_hold_are_quoted(server: PictureServer, fetcher: Fetcher) -> None:
    server.pages["/ein bild ü.png"] = body(png())

    assert await fetcher.fetch(server.url("/ein bild ü.png")) == png()
    assert server.requests[0].raw_path == "/ein%20bild%20%C3%BC.png"


@pytest.mark.parametrize("status", [201, 204, 304, 400, 403, 404, 500, 503])
async def test_an_answer_other_than_200_is_a_failed_fetch(server: PictureServer, status: int) -> None:
    async def page(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status)

    server.pages["/status"] = page

    error = await refusal(unopened(), server.url("/status"))

    assert (error.code, str(status) in error.message) == ("image_fetch_failed", True)


async def test_a_refused_connection_is_a_failed_fetch(server: PictureServer) -> None:
    url = server.url()
    await server.close()  # from here on nobody listens there

    assert (await refusal(unopened(), url)).code == "image_fetch_failed"


async def test_the_byte_limit_is_exact(server: PictureServer) -> None:
    server.pages |= {"/fits": body(b"a" * 1000), "/large": body(b"a" * 1001)}
    fetcher = unopened(max_picture_bytes=1000)
    await fetcher.open()
    assert len(await fetcher.fetch(server.url("/fits"))) == 1000
    await fetcher.close()

    error = await refusal(fetcher, server.url("/large"))

    assert (error.code, error.message) == ("image_too_large", "the picture has more than the allowed 1000 bytes")


async def test_a_body_without_end_is_cut_at_the_limit(server: PictureServer) -> None:
    num_sent = 0

    async def page(request: web.Request) -> web.StreamResponse:
        nonlocal num_sent
        response = web.StreamResponse()  # chunked: no length is declared
        await response.prepare(request)
        while True:
            await response.write(b"a" * 10_000)
            num_sent += 10_000

    server.pages["/endless"] = page

    assert (await refusal(unopened(max_picture_bytes=50_000), server.url("/endless"))).code == "image_too_large"
    assert num_sent < 50_000_000


@pytest.mark.parametrize("declared", ["10", "99999999999"])
async def test_a_declared_length_is_not_believed(declared: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: " + declared.encode() + b"\r\n\r\n" + b"a" * 300)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"

    assert (await refusal(unopened(), url)).code == "image_fetch_failed"

    server.close()
    await server.wait_closed()


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("x-gzip", gzip.compress)])
async def test_a_compressed_body_is_read_up_to_the_limit(server: PictureServer, encoding: str, compress: Any) -> None:
    server.pages |= {
        "/fits": body(compress(b"a" * 100_000), Content_Encoding=encoding),
        "/bomb": body(compress(b"a" * 100_001), Content_Encoding=encoding),
    }
    fetcher = unopened(max_picture_bytes=100_000)
    await fetcher.open()

    assert await fetcher.fetch(server.url("/fits")) == b"a" * 100_000
    await fetcher.close()
    assert (await refusal(fetcher, server.url("/bomb"))).code == "image_too_large"


@pytest.mark.parametrize(
    ("encoding", "data"), [("br", b"x"), ("zstd", b"x"), ("gzip", b"not gzip"), ("gzip", gzip.compress(b"a" * 5000, mtime=0)[:30])]
)
async def test_other_and_broken_compressions_are_a_failed_fetch(server: PictureServer, encoding: str, data: bytes) -> None:
    server.pages["/odd"] = body(data, Content_Encoding=encoding)

    assert (await refusal(unopened(), server.url("/odd"))).code == "image_fetch_failed"


async def test_a_server_that_does_not_answer_is_given_up(server: PictureServer) -> None:
    server.pages["/silent"] = Gate(b"")

    error = await refusal(unopened(first_byte_timeout_s=0.1), server.url("/silent"))

    assert error.code == "image_fetch_timeout"


async def test_a_server_that_drips_is_given_up(server: PictureServer) -> None:
    async def page(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"a")
            await asyncio.sleep(0.01)

    server.pages["/drip"] = page

    error = await refusal(unopened(first_byte_timeout_s=5, fetch_timeout_s=0.15), server.url("/drip"))

    assert error.code == "image_fetch_timeout"


async def test_a_name_server_that_does_not_answer_is_given_up() -> None:
    async def look_up(host: str) -> list[str]:
        await asyncio.Event().wait()
        return []

    fetcher = Fetcher(VisionConfig(connect_timeout_s=0.1), look_up=look_up)

    assert (await refusal(fetcher, "http://slow.example/")).code == "image_fetch_timeout"


async def test_equal_urls_in_flight_share_one_download(server: PictureServer, fetcher: Fetcher) -> None:
    gate = server.pages["/gate"] = Gate(png())
    fetches = [asyncio.create_task(fetcher.fetch(server.url("/gate"))) for _ in range(50)]
    await until(lambda: len(server.requests) == 1)

    gate.is_open.set()

    assert await asyncio.gather(*fetches) == [png()] * 50
    assert len(server.requests) == 1


async def test_tenants_share_no_download(server: PictureServer, fetcher: Fetcher) -> None:
    gate = server.pages["/gate"] = Gate(png())
    fetches = [asyncio.create_task(fetcher.fetch(server.url("/gate"), tenant=tenant)) for tenant in "ab"]

    await until(lambda: len(server.requests) == 2)

    gate.is_open.set()
    await asyncio.gather(*fetches)


async def test_a_download_goes_on_until_its_last_caller_left(server: PictureServer, fetcher: Fetcher) -> None:
    gate = server.pages["/gate"] = Gate(png())
    first, second, third = (asyncio.create_task(fetcher.fetch(server.url("/gate"))) for _ in range(3))
    await until(lambda: len(server.requests) == 1)

    first.cancel()
    await asyncio.wait((first,))
    gate.is_open.set()

    assert await second == await third == png()
    assert gate.num_left == 0


async def test_a_download_that_nobody_waits_for_is_cancelled(server: PictureServer, fetcher: Fetcher) -> None:
    gate = server.pages["/gate"] = Gate(png())
    fetches = [asyncio.create_task(fetcher.fetch(server.url("/gate"))) for _ in range(2)]
    await until(lambda: len(server.requests) == 1)

    for fetch in fetches:
        fetch.cancel()

    await until(lambda: gate.num_left == 1)
    assert all(fetch.cancelled() for fetch in fetches)


async def test_a_shared_failure_reaches_every_caller_and_is_not_kept(server: PictureServer, fetcher: Fetcher) -> None:
    results = await asyncio.gather(*(fetcher.fetch(server.url("/later")) for _ in range(3)), return_exceptions=True)
    server.pages["/later"] = body(png())

    assert [type(result) for result in results] == [MediaError] * 3
    assert await fetcher.fetch(server.url("/later")) == png()


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_what_may_pass_is_tried_again(server: PictureServer, fetcher: Fetcher, status: int) -> None:
    server.pages["/busy"] = in_turn(web.Response(status=status), web.Response(body=png()))

    assert await fetcher.fetch(server.url("/busy")) == png()
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 500, 501])
async def test_what_will_not_pass_is_asked_once(server: PictureServer, status: int) -> None:
    server.pages["/gone"] = in_turn(web.Response(status=status))

    assert (await refusal(unopened(), server.url("/gone"))).code == "image_fetch_failed"
    assert len(server.requests) == 1


async def test_attempts_are_bounded(server: PictureServer) -> None:
    server.pages["/busy"] = in_turn(*(web.Response(status=503) for _ in range(9)))

    error = await refusal(unopened(max_download_retries=2), server.url("/busy"))

    assert (error.code, "503" in error.message, len(server.requests)) == ("image_fetch_failed", True, 3)


async def test_a_server_that_wants_a_long_pause_is_not_asked_again(server: PictureServer) -> None:
    server.pages["/busy"] = in_turn(web.Response(status=503, headers={"Retry-After": "60"}))

    assert (await refusal(unopened(), server.url("/busy"))).code == "image_fetch_failed"
    assert len(server.requests) == 1


async def test_a_connection_that_breaks_is_tried_again() -> None:
    num_connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        await reader.readuntil(b"\r\n\r\n")
        length = len(png()) if num_connections == 3 else 10_000
        if num_connections > 1:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + png())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    fetcher = unopened()
    await fetcher.open()

    assert await fetcher.fetch(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/") == png()

    await fetcher.close()
    server.close()
    await server.wait_closed()


async def test_a_picture_is_revalidated_and_not_sent_again(server: PictureServer, fetcher: Fetcher) -> None:
    server.pages["/tagged"] = in_turn(web.Response(body=png(), headers={"ETag": '"v1"'}), web.Response(status=304))

    first, second = [await fetcher.fetch(server.url("/tagged")) for _ in range(2)]

    assert first == second == png()
    assert [request.headers.get("If-None-Match") for request in server.requests] == [None, '"v1"']


async def test_a_picture_that_changed_is_taken_anew(server: PictureServer, fetcher: Fetcher) -> None:
    answers = [web.Response(body=data, headers={"ETag": f'"{tag}"'}) for tag, data in (("v1", b"old"), ("v2", b"new"))]
    server.pages["/tagged"] = in_turn(*answers)

    assert [await fetcher.fetch(server.url("/tagged")) for _ in range(2)] == [b"old", b"new"]


async def test_a_fresh_picture_is_not_asked_for(server: PictureServer, fetcher: Fetcher) -> None:
    server.pages["/fresh"] = body(png(), Cache_Control="max-age=600")

    assert [await fetcher.fetch(server.url("/fresh")) for _ in range(3)] == [png()] * 3
    assert len(server.requests) == 1


async def test_tenants_share_no_kept_picture(server: PictureServer, fetcher: Fetcher) -> None:
    server.pages["/fresh"] = body(png(), Cache_Control="max-age=600", ETag='"v1"')

    for tenant in ("a", "b"):
        await fetcher.fetch(server.url("/fresh"), tenant=tenant)

    assert ["If-None-Match" in request.headers for request in server.requests] == [False, False]


async def test_one_host_gets_a_few_requests_at_a_time(server: PictureServer) -> None:
    gate = server.pages["/gate"] = Gate(png())
    fetcher = unopened(max_downloads_per_host=3)
    await fetcher.open()
    fetches = [asyncio.create_task(fetcher.fetch(server.url("/gate"), tenant=str(at))) for at in range(10)]
    other = await fetcher.fetch(server.url(host="elsewhere.example"))

    await until(lambda: len(server.requests) == 1 + 3)
    gate.is_open.set()

    assert (other, await asyncio.gather(*fetches)) == (png(), [png()] * 10)
    assert gate.max_waiting == 3
    await fetcher.close()


async def test_only_allowed_hosts_are_asked(server: PictureServer) -> None:
    fetcher = unopened(allowed_media_domains=("pictures.example", "*.cdn.example"))
    await fetcher.open()
    for host in ("pictures.example", "PICTURES.example.", "a.b.cdn.example"):
        assert await fetcher.fetch(server.url(host=host)) == png()
    num_requests = len(server.requests)
    server.pages["/away"] = redirect_to(server.url(host="other.example"))

    for url in [server.url(host=host) for host in ("other.example", "xpictures.example", "cdn.example", "127.0.0.1")] + [
        server.url("/away", host="pictures.example")
    ]:
        with pytest.raises(MediaError) as caught:
            await fetcher.fetch(url)
        assert caught.value.code == "url_blocked"

    assert len(server.requests) == num_requests + 1  # the redirect itself
    await fetcher.close()


async def test_a_slow_drip_is_cut_long_before_the_whole_limit(server: PictureServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vision.body.DRIP_GRACE_S", 0.05)

    async def page(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"a")
            await asyncio.sleep(0.01)

    server.pages["/drip"] = page

    error = await refusal(unopened(), server.url("/drip"))

    assert (error.code, "too slowly" in error.message) == ("image_fetch_timeout", True)


async def test_the_operators_proxy_is_asked_for_the_whole_url(server: PictureServer) -> None:
    """The test's server takes the proxy's part: it is asked for absolute URLs, and dialled although no proxy's address is public."""
    fetcher = Fetcher(VisionConfig(media_proxy=f"http://127.0.0.1:{server.port}"), look_up=public)
    await fetcher.open()
    server.pages["/a.png"] = body(png())

    assert await fetcher.fetch("http://pictures.example/a.png") == png()
    for url in ("http://127.0.0.1/a.png", "http://169.254.169.254/", "http://2130706433/"):
        with pytest.raises(MediaError, match="address"):
            await fetcher.fetch(url)

    assert [request.raw_path for request in server.requests] == ["http://pictures.example/a.png"]
    await fetcher.close()


async def test_a_name_that_is_seen_to_be_private_is_not_asked_of_the_proxy(server: PictureServer) -> None:
    async def look_up(host: str) -> list[str]:
        return ["10.0.0.1"]

    fetcher = Fetcher(VisionConfig(media_proxy=f"http://127.0.0.1:{server.port}"), look_up=look_up)

    assert (await refusal(fetcher, "http://intranet.example/")).code == "url_blocked"
    assert server.requests == []


async def public(host: str) -> list[str]:
    return ["93.184.216.34"]


async def test_environment_proxies_are_not_used(server: PictureServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    fetcher = unopened()
    await fetcher.open()

    assert await fetcher.fetch(server.url()) == png()
    await fetcher.close()


async def test_cookies_are_not_kept(server: PictureServer, fetcher: Fetcher) -> None:
    server.pages["/cookie"] = body(png(), Set_Cookie="a=b; Path=/")

    await fetcher.fetch(server.url("/cookie"))
    await fetcher.fetch(server.url("/picture"))

    assert "Cookie" not in server.requests[1].headers


async def test_data_urls_are_read(fetcher: Fetcher) -> None:
    assert await fetcher.fetch(data_url(png())) == png()


async def test_files_are_refused_unless_a_folder_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())

    assert (await refusal(unopened(), f"file://{tmp_path}/a.png")).code == "url_blocked"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """An allowed folder beside a secret."""
    root = tmp_path / "allowed"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a b.png").write_bytes(png())
    (root / "link.png").symlink_to(root / "sub" / "a b.png")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "allowed2").mkdir()
    (tmp_path / "allowed2" / "secret").write_bytes(b"secret")
    (root / "escape").symlink_to(tmp_path / "secret")
    (root / "folder").symlink_to(tmp_path)
    os.mkfifo(root / "pipe")
    return root


@pytest.mark.parametrize("prefix", ["file://", "FILE://", "file://localhost"])
async def test_files_under_the_allowed_folder_are_read(local: Path, prefix: str) -> None:
    fetcher = unopened(allowed_local_media_path=str(local))
    await fetcher.open()

    assert await fetcher.fetch(f"{prefix}{local}/sub/a%20b.png") == png()
    assert await fetcher.fetch(f"{prefix}{local}/link.png") == png()
    await fetcher.close()


@pytest.mark.parametrize(
    "path", ["/escape", "/folder/secret", "/../secret", "/sub/../../secret", "/%2e%2e/secret", "/..%2fsecret", "2/secret"]
)
async def test_no_path_leads_out_of_the_allowed_folder(local: Path, path: str) -> None:
    error = await refusal(unopened(allowed_local_media_path=str(local)), f"file://{local}{path}")

    assert error.code == "url_blocked"


@pytest.mark.parametrize("path", ["/missing", "/sub", "/pipe"])
async def test_what_is_not_a_file_is_a_failed_fetch(local: Path, path: str) -> None:
    error = await refusal(unopened(allowed_local_media_path=str(local)), f"file://{local}{path}")

    assert error.code == "image_fetch_failed"


async def test_files_of_other_hosts_are_refused(local: Path) -> None:
    assert (await refusal(unopened(allowed_local_media_path=str(local)), f"file://elsewhere{local}/link.png")).code == "url_blocked"


async def test_files_over_the_limit_are_refused(local: Path) -> None:
    fetcher = unopened(allowed_local_media_path=str(local), max_picture_bytes=10)

    assert (await refusal(fetcher, f"file://{local}/link.png")).code == "image_too_large"


async def test_few_connections_are_kept_open_whatever_their_hosts(server: PictureServer, fetcher: Fetcher) -> None:
    await fetcher.fetch(server.url())
    before = num_descriptors() - 2  # both ends of a connection are ours

    await asyncio.gather(*(fetcher.fetch(server.url(host=f"host{at}.example")) for at in range(100)))

    await until(lambda: num_descriptors() == before + 2 * MAX_IDLE_CONNECTIONS)


async def test_connections_that_are_kept_are_used_again(server: PictureServer, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vision.connector.MAX_IDLE_CONNECTIONS", 1)
    ports = list[int]()

    async def page(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        ports.append(request.transport.get_extra_info("peername")[1])
        return web.Response(body=png())

    server.pages["/page"] = page

    for host in ("a.example", "a.example", "b.example", "b.example", "a.example"):
        assert await fetcher.fetch(server.url("/page", host=host)) == png()

    first, second, third, fourth, fifth = ports
    assert (first, third) == (second, fourth), "kept"
    assert len({first, third, fifth}) == 3, "the last one only"


async def test_a_connection_that_its_host_closes_takes_no_place(
    server: PictureServer, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vision.connector.MAX_IDLE_CONNECTIONS", 2)
    before = num_descriptors()
    await fetcher.fetch(server.url(host="a.example"))
    other = PictureServer()
    await other.open()
    await fetcher.fetch(other.url())
    await other.close()
    await until(lambda: num_descriptors() == before + 2)

    await fetcher.fetch(server.url(host="b.example"))

    await until(lambda: num_descriptors() == before + 4)


async def test_nothing_stays_open_after_fetches_of_all_kinds(server: PictureServer) -> None:
    before = num_descriptors()
    server.pages |= {"/large": body(b"a" * 200_000), "/away": redirect_to("http://10.0.0.1/"), "/gate": Gate(b"")}
    fetcher = unopened(max_picture_bytes=100_000, first_byte_timeout_s=0.1)
    await fetcher.open()
    urls = [server.url(path) for path in ("/picture", "/large", "/away", "/gate", "/missing")] * 4

    await asyncio.gather(*(fetcher.fetch(url, tenant=str(at)) for at, url in enumerate(urls)), return_exceptions=True)

    await fetcher.close()
    await until(lambda: num_descriptors() == before)
