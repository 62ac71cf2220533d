from pathlib import Path

import psutil
import pytest

from tests.server_process import server_process
from tests.tiny_models import write_tiny


def listening_addresses(process_id: int) -> dict[str, set[str]]:
    """Role → addresses, for every TCP socket that a process of the tree listens on; datagram sockets count too."""
    root = psutil.Process(process_id)
    addresses: dict[str, set[str]] = {}
    for process in [root, *root.children(recursive=True)]:
        for connection in process.net_connections("inet"):
            if connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE):
                role = next((word for word in process.cmdline() if word.startswith(("engine.", "vision."))), "server")
                addresses.setdefault(role, set()).add(f"{connection.laddr.ip}:{connection.laddr.port}")
    return addresses


@pytest.mark.full
@pytest.mark.parametrize("tp", [1, 2])
def test_nothing_but_the_server_s_own_port_can_be_reached_from_another_machine(tp: int, tmp_path: Path) -> None:
    model = write_tiny("llava", tmp_path / "model")

    with server_process(model, "--tp", str(tp)) as server:
        addresses = listening_addresses(server.process.pid)

    assert addresses.pop("server") == {server.url.removeprefix("http://")}
    assert all(address.startswith(("127.0.0.1:", "::1:")) for found in addresses.values() for address in found)
    assert set(addresses) <= ({"engine.process", "engine.workers"} if tp > 1 else set())
