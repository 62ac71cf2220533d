"""What `vlm-server check_env` prints: the facts that a bug report needs, and nothing private."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path

from vlm_server import __version__

_PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "tokenizers",
    "fastapi",
    "uvicorn",
    "sse-starlette",
    "python-multipart",
    "aiohttp",
    "pillow",
    "numpy",
    "msgspec",
)
_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_ENDPOINT")


def describe_environment() -> dict[str, str]:
    """Name → value, in the order to print."""
    return {
        "vlm-server": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{_cpu_name()}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores",
        "memory": _memory(),
        **{name: _version(name) for name in _PACKAGES},
        "cuda": _cuda(),
        **{name: value for name in _VARIABLES if (value := os.environ.get(name))},
    }


def write_json(path: str, facts: dict[str, str]) -> None:
    Path(path).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    except (ValueError, OSError):
        return "unknown"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "not available" if torch.version.cuda else "this torch is built for CPUs only"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: {', '.join(names)}"
