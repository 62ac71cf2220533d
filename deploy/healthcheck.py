"""Exits with 0 where the server in this container answers GET /health/ready with success, by HTTP or by HTTPS, else with 1."""

import http.client
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path

PORT_FILE = Path("/run/vlm-server-port")  # written by the entrypoint
DEFAULT_PORT = "23333"
TIMEOUT_S = 4.0


def main() -> int:
    port = PORT_FILE.read_text().strip() if PORT_FILE.exists() else DEFAULT_PORT
    try:
        try:
            return _check(f"http://127.0.0.1:{port}/health/ready")
        except (
            ConnectionResetError,
            http.client.BadStatusLine,
        ):  # it speaks TLS alone
            return _check(f"https://127.0.0.1:{port}/health/ready")
    except (urllib.error.URLError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def _check(url: str) -> int:
    """Whose certificate it is does not matter: this is our own container, and nothing is told."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    with opener.open(url, timeout=TIMEOUT_S) as response:
        return 0 if response.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
