"""Templates that are slow, greedy or hostile, and the process that they run in."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from vlm_server.errors import to_api_error
from vlm_server.jinja_process import JinjaProcess, RendererLostError, RenderError, RenderLimitError, _Worker
from vlm_server.jinja_worker import RenderLimits

LIMITS = RenderLimits(cpu_s=0.5, memory_bytes=64 << 20, max_characters=100_000)
FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def jinja() -> Iterator[JinjaProcess]:
    jinja = JinjaProcess(LIMITS)
    yield jinja
    jinja.close()


def render(jinja: JinjaProcess, source: str, **variables: object) -> str:
    messages = [{"role": "user", "content": "hi"}]
    return jinja.render(source, messages, tools=None, add_generation_prompt=True, variables=variables)


TIME, MEMORY, LENGTH = "0.5 s of processor time", "64 MiB", "100000 characters"
GREEDY = {
    "loops in loops": (FOREVER, TIME),
    "a power": ("{{ (10 ** 10) ** (10 ** 8) }}", f"{TIME}|{MEMORY}"),
    "a power of a power": ("{{ 9 ** (9 ** 9) > 0 }}", f"{TIME}|{MEMORY}"),
    "a long string": ("{{ ('x' * 10 ** 10) | length }}", f"{MEMORY}"),
    "a wide format": ("{{ '%2000000000d' % 1 }}", MEMORY),
    "a doubled string": ("{% set n = namespace(s='xx') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}", MEMORY),
    "much text": ("{% for i in range(99999) %}{{ 'xxxxxxxxxx' }}{% endfor %}", LENGTH),
}


@pytest.mark.parametrize(("source", "limit"), GREEDY.values(), ids=GREEDY)
def test_a_greedy_template_ends_in_an_error_that_names_the_limit_and_the_next_one_is_rendered(
    source: str, limit: str, jinja: JinjaProcess
) -> None:
    with pytest.raises(RenderError, match=limit):
        render(jinja, source)

    assert render(jinja, "{{ messages[0].content }}") == "hi"


HOSTILE = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__.json }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "files": "{% include '/etc/passwd' %}",
    "changes": "{{ messages.append(1) }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "division": "{{ 1 // 0 }}",
    "no such thing": "{{ messages[0].content.no.such }}",
    "syntax": "{% for %}",
    "own complaint": "{{ raise_exception('no ' * 10000) }}",
    "half a surrogate pair": "{{ half }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_whatever_a_template_does_wrong_is_its_own_complaint(source: str, jinja: JinjaProcess) -> None:
    with pytest.raises(RenderError) as caught:
        render(jinja, source, half="\ud800")

    assert not isinstance(caught.value, RenderLimitError)
    assert 0 < len(str(caught.value)) <= 1000


def test_variables_of_any_size_reach_the_template(jinja: JinjaProcess) -> None:
    assert render(jinja, "{{ number }} {{ words[1] }}", number=10**30, words=["a", "你好"]) == f"{10**30} 你好"


def test_the_worker_that_died_while_idle_is_replaced(jinja: JinjaProcess) -> None:
    render(jinja, "x")
    assert jinja._worker
    worker = psutil.Process(jinja._worker._process.pid)
    worker.kill()
    psutil.wait_procs([worker], timeout=10)

    assert render(jinja, "{{ messages[0].role }}") == "user"


def killed_while_rendering(jinja: JinjaProcess, *, times: int) -> str:
    """What is rendered by a worker that somebody kills so often in the middle of it."""

    class Killed(_Worker):
        num_left = times

        def exchange(self, request: bytes) -> bytes:
            if Killed.num_left:
                Killed.num_left -= 1
                self._process.kill()
            return super().exchange(request)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("vlm_server.jinja_process._Worker", Killed)
        return render(jinja, "{{ messages[0].role }}")


def test_a_rendering_whose_worker_is_killed_is_done_again_by_another_one() -> None:
    jinja = JinjaProcess(LIMITS)

    assert killed_while_rendering(jinja, times=1) == "user"

    jinja.close()


def test_a_rendering_whose_workers_are_killed_over_and_over_is_given_up_and_the_next_one_is_done() -> None:
    jinja = JinjaProcess(LIMITS)

    with pytest.raises(RendererLostError, match="killed over and over"):
        killed_while_rendering(jinja, times=9)

    assert render(jinja, "{{ messages[0].role }}") == "user"
    jinja.close()


def test_a_lost_renderer_is_a_503_and_no_fault_of_the_messages() -> None:
    error = to_api_error(RendererLostError("other prompts took longer than 20 s"))

    assert (error.status, error.code, error.headers["retry-after"]) == (503, "template_unavailable", "2")


def test_closing_ends_a_rendering_under_way_and_the_worker() -> None:
    patient = JinjaProcess(RenderLimits(cpu_s=60))
    render(patient, "x")
    before = len(workers())
    failures: list[Exception] = []

    def forever() -> None:
        try:
            render(patient, FOREVER)
        except RendererLostError as error:
            failures.append(error)

    thread = threading.Thread(target=forever)
    thread.start()
    while not patient._turn.locked():
        os.sched_yield()
    patient.close()
    thread.join(10)

    assert [type(failure) for failure in failures] == [RendererLostError]
    assert len(workers()) == before - 1
    with pytest.raises(RendererLostError, match="the server is ending"):
        render(patient, "x")


def test_a_forgotten_process_ends_with_its_object() -> None:
    before = len(workers())
    render(JinjaProcess(), "x")

    assert len(workers()) == before


def test_the_worker_sees_no_secrets_and_little_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    jinja = JinjaProcess()
    render(jinja, "x")

    assert all("HF_TOKEN" not in worker.environ() for worker in workers()[-1:])
    jinja.close()


def test_the_worker_gains_no_rights_and_still_knows_what_templates_load_late(jinja: JinjaProcess) -> None:
    before = datetime.now().strftime("%Y-%m-%d %H")
    text = render(jinja, "{{ strftime_now('%Y-%m-%d %H') }} {{ messages | tojson }}")
    after = datetime.now().strftime("%Y-%m-%d %H")

    assert text in [f'{hour} [{{"role": "user", "content": "hi"}}]' for hour in (before, after)]
    assert "NoNewPrivs:\t1" in Path(f"/proc/{workers()[-1].pid}/status").read_text()


def test_a_worker_that_nobody_watches_ends_by_itself() -> None:
    """The server is killed in the middle of a rendering: the processor time of its worker is limited all the same."""
    code = (
        "from vlm_server.jinja_process import *\n"
        "jinja = JinjaProcess(RenderLimits(cpu_s=1.0))\n"
        "options = {'tools': None, 'add_generation_prompt': True, 'variables': {}}\n"
        "jinja.render('x', [], **options)\n"
        "print(jinja._worker._process.pid, flush=True)\n"
        f"jinja.render({FOREVER!r}, [], **options)\n"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert server.stdout
    worker = psutil.Process(int(server.stdout.readline()))
    idle_s = sum(worker.cpu_times()[:2])
    deadline_s = time.monotonic() + 10
    while sum(worker.cpu_times()[:2]) < idle_s + 0.1:
        assert time.monotonic() < deadline_s, "the worker does not render"
    server.kill()
    server.communicate()

    psutil.wait_procs([worker], timeout=20)

    assert not worker.is_running()


def workers() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and "vlm_server.jinja_worker" in child.cmdline()]
