"""The inference engine: tokens in, tokens out. Knows no HTTP and no text."""

import vision  # noqa: F401 - makes torchvision, which transformers loads, importable beside a CPU-only torch
