import pytest

QUICK = 8


def _sizes(full: int) -> dict:
    """Seeded prompts per configuration; all of them in the full run only."""
    return {"scope": "session", "params": [QUICK, pytest.param(full, marks=pytest.mark.full)], "ids": lambda count: f"{count} prompts"}


@pytest.fixture(**_sizes(24))
def num_prompts(request: pytest.FixtureRequest) -> int:
    """Of a tiny checkpoint."""
    return request.param


@pytest.fixture(**_sizes(50))
def num_embedded_prompts(request: pytest.FixtureRequest) -> int:
    return request.param
