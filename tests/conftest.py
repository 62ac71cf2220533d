import pytest
from hypothesis import settings

import vision  # noqa: F401 - makes torchvision, which transformers loads, importable beside a CPU-only torch

# No test depends on time: on a busy machine one example may take seconds.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# A helper that judges: what it compared belongs in the message, as in a test's own file.
pytest.register_assert_rewrite("tests.engine.scheduling")
