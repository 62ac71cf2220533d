"""An internet of one process: a network namespace without a route out, in which every address is this machine's.

Run as `python -m tests.robustness.closed_internet FILE`: enters new network and mount namespaces, answers every name and every
connection itself, runs the server with the embedded model there, asks it for pictures, and writes what happened to FILE as JSON.
"""

import json
import os
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, urlsplit

import dns.message
import dns.rdatatype
import dns.rrset

from tests.robustness.forbidden_urls import ALIAS, FORBIDDEN, NAMES, PUBLIC, REDIRECTED
from tests.server_process import ServerProcess, server_process
from tests.vision.pictures import png

PUBLIC_ADDRESSES = {"pictures.test": ("93.184.216.34", "2606:2800:220:1::1"), "cdn.test": ("151.101.1.1",)}
REBOUND = "rebound.test"  # leads to a public address and to a private one by turns
MIXED = "mixed.test"  # to both at once
NUM_REBOUND = 20
_TTL_S = 0


def enter() -> None:
    """New namespaces for this process and its children; every address leads to it, and its resolver is here too."""
    CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS | CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "no new namespaces")
    for command in (
        "mount --make-rprivate /",
        "ip link set lo up",
        "ip route add local default dev lo",
        "ip -6 route add local ::/0 dev lo",
    ):
        subprocess.run(command.split(), check=True)
    resolv = Path(tempfile.mkdtemp(), "resolv.conf")
    resolv.write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:2\n")
    subprocess.run(["mount", "--bind", str(resolv), "/etc/resolv.conf"], check=True)


class Resolver(socketserver.BaseRequestHandler):
    """Answers A and AAAA questions over UDP."""

    num_rebound = 0

    def handle(self) -> None:
        data, reply_to = self.request
        question = dns.message.from_wire(data)
        response = dns.message.make_response(question, recursion_available=True)
        asked = question.question[0]
        name, kind = str(asked.name).rstrip(".").lower(), dns.rdatatype.to_text(asked.rdtype)
        if name == ALIAS:
            response.answer.append(dns.rrset.from_text(f"{ALIAS}.", _TTL_S, "IN", "CNAME", "private.test."))
            name = "private.test"
        for address in self._addresses(name, kind):
            if kind == ("AAAA" if ":" in address else "A"):
                response.answer.append(dns.rrset.from_text(f"{name}.", _TTL_S, "IN", kind, address))
        reply_to.sendto(response.to_wire(), self.client_address)

    @classmethod
    def _addresses(cls, name: str, kind: str) -> tuple[str, ...]:
        if name == REBOUND and kind == "A":
            cls.num_rebound += 1
            return ("10.0.0.1",) if cls.num_rebound % 2 == 0 else ("93.184.216.34",)
        if name == MIXED:
            return "10.0.0.1", "93.184.216.34", "127.0.0.1"
        return (NAMES[name],) if name in NAMES else PUBLIC_ADDRESSES.get(name, ())


class Web(BaseHTTPRequestHandler):
    """On public addresses a picture server; on all others a trap, which counts who came."""

    trapped: ClassVar[Counter[str]] = Counter()
    served: ClassVar[Counter[str]] = Counter()

    def setup(self) -> None:
        super().setup()
        address = self.connection.getsockname()[0].removeprefix("::ffff:")
        is_public = any(address in addresses for addresses in PUBLIC_ADDRESSES.values())
        (self.served if is_public else self.trapped)[address] += 1

    def do_GET(self) -> None:
        target = parse_qs(urlsplit(self.path).query).get("to")
        if target:
            self.send_response(302)
            self.send_header("Location", target[0])
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(png(32, 32))

    def log_message(self, format: str, *args: Any) -> None:
        pass


class DualStack(ThreadingHTTPServer):
    """On every address of both families."""

    address_family = socket.AF_INET6
    daemon_threads = True

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)


def in_background(serve: Callable[[], None]) -> None:
    threading.Thread(target=serve, daemon=True).start()


def ask(server: ServerProcess, url: str) -> tuple[int, str | None]:
    """(status, the error's code) of a chat about the picture at `url`."""
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    body = {"model": "vlm-demo", "messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as response:
            return int(response.status), None
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["code"]


def redirect_to(url: str, server: str = PUBLIC) -> str:
    """A page of a public server that points there."""
    return f"{server}/?to={quote(url, safe='')}"


def main(found_file: str) -> None:
    enter()
    os.environ.pop("http_proxy", None)
    resolver = socketserver.ThreadingUDPServer(("127.0.0.1", 53), Resolver)
    in_background(resolver.serve_forever)
    for port in (80, 443):
        in_background(DualStack(("::", port), Web).serve_forever)
    with server_process() as server:
        found = {
            "forbidden": {url: ask(server, url) for url in FORBIDDEN},
            "redirected": {url: ask(server, redirect_to(url)) for url in REDIRECTED},
            "redirected twice": {url: ask(server, redirect_to(redirect_to(url, "http://cdn.test"))) for url in REDIRECTED},
            "rebound": [ask(server, f"http://{REBOUND}/?{number}") for number in range(NUM_REBOUND)],
            "public": {
                url: ask(server, url) for url in (f"{PUBLIC}/a.png", "http://cdn.test/", f"http://{MIXED}/", "http://93.184.216.34/")
            },
            "public redirected": ask(server, redirect_to("http://cdn.test/b.png")),
        }
        found["trapped"] = dict(Web.trapped)
        found["served"] = dict(Web.served)
    Path(found_file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
