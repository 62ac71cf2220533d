"""Runs LMDeploy's own `APIClient` against a server: `python lmdeploy_client.py WHEEL URL`, in an environment with `requests` alone.

The client is one module of a package that loads CUDA libraries; its parents are stubs here, so that only that module is loaded, from
the wheel. Prints what each call gave, as JSON.
"""

import json
import logging
import sys
import types
import zipfile
from types import ModuleType
from typing import Any

MODULE = "lmdeploy.serve.openai.api_client"
PICTURE = sys.argv[3] if len(sys.argv) > 3 else ""
HELLO = [{"role": "user", "content": "Hello! How are you?"}]


def api_client_module(wheel: str) -> ModuleType:
    """LMDeploy's module, from the wheel's bytes."""
    for name in ("lmdeploy", "lmdeploy.serve", "lmdeploy.serve.openai", "lmdeploy.utils"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["lmdeploy.utils"].get_logger = logging.getLogger  # type: ignore[attr-defined]
    source = zipfile.ZipFile(wheel).read(MODULE.replace(".", "/") + ".py")
    module = sys.modules[MODULE] = types.ModuleType(MODULE)
    exec(compile(source, MODULE, "exec"), module.__dict__)
    return module


def calls(client: Any) -> dict[str, Any]:
    """Every call of its users, by name."""
    model = client.available_models[0]
    parts = [{"type": "text", "text": "Describe the image please"}, {"type": "image_url", "image_url": {"url": PICTURE}}]
    found = {
        "models": client.available_models,
        "chat": list(client.chat_completions_v1(model=model, messages=HELLO, temperature=0.0)),
        "chat stream": list(client.chat_completions_v1(model=model, messages=HELLO, temperature=0.0, stream=True)),
        "chat picture": list(client.chat_completions_v1(model=model, messages=[{"role": "user", "content": parts}])),
        "completion": list(client.completions_v1(model=model, prompt="hi", temperature=0.0)),
        "completion stream": list(client.completions_v1(model=model, prompt="hi", temperature=0.0, stream=True)),
        "interactive": list(client.chat_interactive_v1(prompt="hi", temperature=0.0)),
        "interactive stream": list(client.chat_interactive_v1(prompt="hi", temperature=0.0, stream=True)),
        "interactive picture": list(client.chat_interactive_v1(prompt="Describe the image please", image_url=PICTURE)),
        "turn 1": list(client.chat("hi, what's your name?", session_id=1)),
        "turn 2 stream": list(client.chat("who developed you?", session_id=1, stream=True)),
        "turn 3": list(client.chat_interactive_v1("and?", session_id=1, interactive_mode=True)),
    }
    client.end_session(1)
    found["after the end"] = list(client.chat_interactive_v1("and?", session_id=1, interactive_mode=False))
    found["encode"] = client.encode("hi there")
    found["encode several"] = client.encode(["hi", "there"], add_bos=False)
    found["unknown model"] = list(client.chat_completions_v1(model="no-such-model", messages=HELLO))
    return found


if __name__ == "__main__":
    wheel, url = sys.argv[1:3]
    client = api_client_module(wheel).APIClient(url)
    print(json.dumps(calls(client)))
