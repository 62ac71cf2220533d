"""Exits with 0 where the server in this container answers GET /health with success, else with 1."""

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
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=TIMEOUT_S) as response:
            return 0 if response.status == 200 else 1
    except (urllib.error.URLError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
