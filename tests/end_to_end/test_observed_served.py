"""The real server seen from outside: timings, metrics and the log of one request with a picture, across all of its processes."""

import json

import pytest
import requests

from tests.server_process import server_process
from vlm_server.examples import RED_CIRCLE

STAGES = ("template", "pictures", "tokenize", "queue", "encode", "prefill", "generate")
PICTURE_STAGES = ("fetch", "decode", "preprocess")


@pytest.mark.full
def test_a_request_with_a_picture_is_seen_in_its_answer_the_metrics_and_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    content = [{"type": "image_url", "image_url": {"url": RED_CIRCLE}}, {"type": "text", "text": "Describe the image please"}]
    body = {"model": "vlm-demo", "messages": [{"role": "user", "content": content}], "max_tokens": 8, "return_timings": True}
    with server_process(None, "--log-format", "json") as server:
        answer = requests.post(f"{server.url}/v1/chat/completions", json=body, headers={"X-Request-Id": "r-1"}, timeout=60).json()
        page = requests.get(f"{server.url}/metrics", timeout=30).text

    timings = answer["timings"]
    assert {f"{name}_ms" for name in (*STAGES, "first_token", "total")} == set(timings) - {"per_picture"}
    [picture] = timings["per_picture"]
    assert {f"{name}_ms" for name in PICTURE_STAGES} == set(picture)
    until_first = sum(timings[f"{name}_ms"] for name in STAGES[:-1])
    assert until_first <= timings["first_token_ms"] + 1  # milliseconds
    assert timings["first_token_ms"] + timings["generate_ms"] <= timings["total_ms"] + 1
    for name in STAGES:
        assert f'vlm:request_stage_seconds_count{{stage="{name}"}} 1.0' in page
    for name in PICTURE_STAGES:
        assert f'vlm:picture_stage_duration_seconds_count{{stage="{name}"}} 1.0' in page
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    [line] = [line for line in lines if line.get("id") == "r-1"]
    assert (line["pictures"], line["status"], line["completion_tokens"]) == (1, 200, answer["usage"]["completion_tokens"])
    assert set(STAGES) <= set(line["stages_ms"])
