"""`GET /metrics`: stages, refusals by their code, caches and ages, under labels that nobody can multiply."""

from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from engine.request import EngineDeadError, EngineStats, QueueFullError
from tests.contract.fake_engine import FIRST_TOKEN_S
from tests.contract.running import RunningServer, fake_config, running_server
from vision.service import STAGE_BOUNDS_S, STAGES, StageClock, VisionStats
from vlm_server.metrics import Metrics
from vlm_server.stage_timings import StageTimings

Sample = tuple[str, tuple[tuple[str, str], ...]]


def parsed(page: str) -> dict[Sample, float]:
    """Every number on the page, by name and labels."""
    families = text_string_to_metric_families(page)
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for family in families for sample in family.samples}


def page_of(metrics: Metrics, *, engine: EngineStats | None = None, vision: VisionStats | None = None) -> dict[Sample, float]:
    return parsed(metrics.page(engine, vision or VisionStats(), num_restarts=0, num_sessions=None, num_turns=0).decode())


def numbers(server: RunningServer, **headers: str) -> dict[Sample, float]:
    return parsed(requests.get(f"{server.url}/metrics", headers=headers, timeout=10).text)


def ask(server: RunningServer, path: str = "/v1/chat/completions", **fields: Any) -> requests.Response:
    body = {"model": server.model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4, **fields}
    return requests.post(server.url + path, json=body, timeout=10)


def errors(server: RunningServer, **headers: str) -> dict[tuple[str, str], float]:
    """Counts by code and status."""
    found = numbers(server, **headers).items()
    return {(dict(labels)["code"], dict(labels)["status"]): value for (name, labels), value in found if name == "vlm:request_errors_total"}


def test_every_refusal_is_counted_by_its_code_wherever_it_is_made(server: RunningServer) -> None:
    before = errors(server)
    cases = (
        ("invalid_value", 400, lambda: ask(server, n=0)),
        ("model_not_found", 404, lambda: ask(server, model="another")),
        ("not_found", 404, lambda: requests.get(f"{server.url}/nope", timeout=10)),
        ("method_not_allowed", 405, lambda: requests.get(f"{server.url}/v1/chat/completions", timeout=10)),
        (
            "invalid_json",
            400,
            lambda: requests.post(f"{server.url}/generate", data="{", headers={"content-type": "application/json"}, timeout=10),
        ),
        (
            "image_decode_failed",
            400,
            lambda: ask(server, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://bad/x"}}]}]),
        ),
    )

    for code, status, send in cases:
        assert send().status_code == status
        assert errors(server)[code, str(status)] == before.get((code, str(status)), 0) + 1, code


def test_what_the_engine_refuses_is_counted_too(server: RunningServer) -> None:
    before = errors(server)
    for refusal, code, status in ((QueueFullError("full"), "queue_full", 429), (EngineDeadError("gone"), "engine_unavailable", 503)):
        server.backend.engine.refusal = refusal

        assert ask(server).status_code == status

        assert errors(server)[code, str(status)] == before.get((code, str(status)), 0) + 1


def test_a_stream_that_fails_on_its_way_is_an_error_of_a_request_that_was_answered_with_200(server: RunningServer) -> None:
    before = errors(server).get(("engine_unavailable", "200"), 0)
    server.backend.engine.fails_after = 2

    assert ask(server, stream=True).status_code == 200

    assert errors(server)["engine_unavailable", "200"] == before + 1


def test_refusals_before_any_route_are_counted_too() -> None:
    with running_server(fake_config(api_keys=("k",), max_body_bytes=100)) as server:
        key = {"Authorization": "Bearer k"}
        assert requests.get(f"{server.url}/v1/models", timeout=10).status_code == 401
        assert requests.post(f"{server.url}/generate", data=b"x" * 101, headers=key, timeout=10).status_code == 413

        assert errors(server, **key) == {("invalid_api_key", "401"): 1, ("request_too_large", "413"): 1}


def test_codes_beyond_what_we_have_share_one_label() -> None:
    metrics = Metrics()
    for number in range(1000):
        metrics.request_started()
        metrics.request_ended("/x", 400, 0.1, f"code-{number}")

    found = {dict(labels)["code"]: value for (name, labels), value in page_of(metrics).items() if name == "vlm:request_errors_total"}

    assert len(found) == 201
    assert sum(found.values()) == 1000
    assert found["other"] == 800


def test_a_requests_stages_are_counted_and_every_answers_own_where_there_are_several(server: RunningServer) -> None:
    before = numbers(server)

    def counted(stage: str) -> float:
        key = ("vlm:request_stage_seconds_count", (("stage", stage),))
        return numbers(server)[key] - before.get(key, 0)

    assert ask(server, n=3).status_code == 200

    assert {stage: counted(stage) for stage in (*FIRST_TOKEN_S, "generate", "first-token")} == {
        **dict.fromkeys(FIRST_TOKEN_S, 3),
        "generate": 3,
        "first-token": 1,
    }


def test_a_stage_is_in_flight_until_it_ends_however_it_ends() -> None:
    metrics = Metrics()
    timings = StageTimings(observer=metrics)
    in_stage = ("vlm:requests_in_stage", (("stage", "template"),))

    def fail() -> None:
        raise ValueError(f"{page_of(metrics)[in_stage]:.0f} in the stage")

    with pytest.raises(ValueError, match="1 in the stage"), timings.stage("template"):
        fail()

    assert page_of(metrics)[in_stage] == 0
    assert page_of(metrics)["vlm:request_stage_seconds_count", (("stage", "template"),)] == 1


def test_pictures_have_a_histogram_per_stage_that_adds_up() -> None:
    clock = StageClock()
    for stage in STAGES:
        for _ in range(3):
            with clock.stage(stage, {}):
                pass
    clock.durations["decode"][-1] += 1  # one that took longer than the last bound
    stats = VisionStats(time_s=clock.time_s, durations=clock.durations, num_done=clock.num_done)

    page = page_of(Metrics(), vision=stats)

    for stage, count in (("fetch", 3), ("decode", 4), ("preprocess", 3)):
        assert page["vlm:picture_stage_duration_seconds_count", (("stage", stage),)] == count
        assert page["vlm:picture_stage_duration_seconds_sum", (("stage", stage),)] == clock.time_s[stage]
    bounds = [*map(str, STAGE_BOUNDS_S), "+Inf"]
    buckets = [page["vlm:picture_stage_duration_seconds_bucket", (("le", bound), ("stage", "decode"))] for bound in bounds]
    assert buckets == sorted(buckets)
    assert buckets[-2:] == [3, 4]


def test_the_oldest_picture_is_as_old_as_its_stage_and_there_is_none_afterwards() -> None:
    clock = StageClock()

    with clock.stage("fetch", {}):
        age_s = clock.oldest_s()
        with clock.stage("decode", {}):
            assert clock.oldest_s() >= age_s > 0

    assert clock.oldest_s() == 0


def test_caches_and_ages_are_on_the_page() -> None:
    engine = EngineStats(num_embedding_cache_hits=1, num_embedding_cache_misses=2, oldest_waiting_s=3.5, oldest_image_waiting_s=4.5)
    vision = VisionStats(
        num_cache_hits=5, num_cache_misses=6, num_http_fresh=7, num_http_revalidated=8, num_http_misses=9, oldest_in_flight_s=0.5
    )

    page = page_of(Metrics(), engine=engine, vision=vision)

    assert {name: page[f"vlm:{name}", ()] for name in EXPECTED} == EXPECTED


EXPECTED = {
    "embedding_cache_hits_total": 1,
    "embedding_cache_misses_total": 2,
    "oldest_waiting_request_age_seconds": 3.5,
    "oldest_waiting_image_age_seconds": 4.5,
    "processed_cache_hits_total": 5,
    "processed_cache_misses_total": 6,
    "http_cache_hits_total": 7,
    "http_cache_revalidations_total": 8,
    "http_cache_misses_total": 9,
    "oldest_picture_age_seconds": 0.5,
}


def test_a_scanner_adds_no_label(server: RunningServer) -> None:
    def scan(number: int) -> None:
        requests.get(f"{server.url}/scan/{number}", headers={"X-Request-Id": f"id{number}"}, timeout=10)
        ask(server, f"/v1/files/{number}", **{f"field{number}": 1})
        ask(server, model=f"model{number}")

    scan(0)
    before = set(numbers(server))

    for number in range(1, 20):
        scan(number)

    assert set(numbers(server)) == before
