"""Readiness of the real server: its first probe, what that leaves behind, and an engine that dies."""

import os
import signal

import pytest
import requests

from tests.server_process import server_process

NOTHING = (
    "vlm:prompt_tokens_total",
    "vlm:generation_tokens_total",
    "vlm:images_encoded_total",
    "vlm:encode_seconds_total",
    "vlm:engine_steps_total",
    "vlm:pictures_total",
    "vlm:embedding_cache_bytes",
    "vlm:num_cached_blocks",
    "vlm:num_referenced_blocks",
    "vlm:time_to_first_token_seconds_count",
    'vlm:pictures_done_total{stage="decode"}',
)
STAGES = ["template", "pictures", "picture-decode", "picture-preprocess", "tokenize", "queue", "encode", "prefill"]


@pytest.mark.full
def test_a_started_server_becomes_ready_and_its_probe_is_in_no_number_and_again_after_its_engine_died() -> None:
    with server_process() as server:
        server.wait_for_health(200, timeout_s=60, path="/health/ready")

        answer = requests.get(f"{server.url}/health/ready", timeout=10).json()
        assert list(answer["probe"]["stages_ms"]) == STAGES
        assert {name: server.metric(name) for name in NOTHING} == dict.fromkeys(NOTHING, 0.0)

        os.kill(server.engine_id, signal.SIGKILL)
        server.wait_for_health(503, timeout_s=10, path="/health/ready")
        assert requests.get(f"{server.url}/health/live", timeout=10).status_code == 200
        server.wait_for_health(200, timeout_s=60, path="/health/ready")
        assert server.metric("vlm:images_encoded_total") == 0
