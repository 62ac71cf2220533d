"""The Dockerfile's own steps in an empty Debian folder, then the container's life with each form of arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.external

CLONE = Path(__file__).parent.parent.parent
LIMIT_S = 1200


@pytest.mark.skipif(os.geteuid() != 0, reason="changes its root folder, which takes root")
def test_the_image_serves_a_picture_question_in_every_form_that_users_type() -> None:
    command = [sys.executable, "-m", "deploy.rehearse_dockerfile", "--build-arg", "TORCH_INDEX="]

    rehearsal = subprocess.run(command, cwd=CLONE, timeout=LIMIT_S, check=False)

    assert rehearsal.returncode == 0
