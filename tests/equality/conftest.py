import pytest


@pytest.fixture(scope="session", params=[8, pytest.param(50, marks=pytest.mark.full)], ids=lambda count: f"{count} prompts")
def num_prompts(request: pytest.FixtureRequest) -> int:
    """Seeded prompts per configuration; all of them in the full run only."""
    return request.param
