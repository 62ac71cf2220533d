import vision  # noqa: F401 - makes torchvision, which transformers loads, importable beside a CPU-only torch
