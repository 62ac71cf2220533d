"""The scheduler under random operations, with a scripted runner that checks everything a real one would rely on."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.request import FinishReason, Request, StepOutput
from tests.engine.scheduling import EOS, ScriptedRunner, deliver, make_request, make_scheduler, scripted_token


def answer_alone(request: Request, session_len: int) -> list[int]:
    keys = list(request.prompt.cache_keys)
    tokens: list[int] = []
    while len(keys) < session_len and len(tokens) < (request.params.max_tokens or session_len):
        tokens.append(scripted_token(keys))
        keys.append(tokens[-1])
        if tokens[-1] == EOS:
            break
    return tokens


TEXTS = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=6)
PICTURES = st.tuples(st.sampled_from(["x", "y", "z"]), st.sampled_from([1, 5, 9]), st.booleans())


class Engine(RuleBasedStateMachine):
    """Random arrivals, aborts, pictures that come and go, and steps, with few blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: dict[str, Request] = {}
        self.answers: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.set_up(10, True)

    def set_up(self, num_blocks: int, prefix: bool) -> None:
        self.scheduler = make_scheduler(num_blocks, max_batch_size=3, max_prefill_token_num=6, enable_prefix_caching=prefix)
        self.runner = ScriptedRunner(self.scheduler)

    @precondition(lambda self: not self.requests)
    @rule(num_blocks=st.integers(10, 16), prefix=st.booleans())
    def choose(self, num_blocks: int, prefix: bool) -> None:
        self.set_up(num_blocks, prefix)

    @rule(
        parts=st.lists(st.one_of(TEXTS, PICTURES), min_size=1, max_size=4),
        max_tokens=st.integers(1, 24),
        copies=st.integers(1, 3),
        tenant=st.sampled_from(["", "a", "b", "c"]),
    )
    def add(self, parts: list[Any], max_tokens: int, copies: int, tenant: str) -> None:
        for _ in range(copies):
            request_id = str(len(self.requests))
            request = make_request(request_id, *parts, max_tokens=max_tokens, tenant=tenant)
            if request.num_prompt_tokens < 40:
                self.scheduler.add(request)
                self.requests[request_id] = request
                self.answers[request_id] = []

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data(), is_failure=st.booleans())
    def end(self, data: st.DataObject, is_failure: bool) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
        output = self.scheduler.fail(request_id, "broken") if is_failure else self.scheduler.abort(request_id)
        assert output is not None
        self.deliver([output])

    @rule(data=st.data())
    def encode(self, data: st.DataObject) -> None:
        needed = [image.content_hash for image in self.scheduler.images_needed()]
        assert not self.runner.embeddings & set(needed)
        if needed:
            self.runner.encoded(data.draw(st.sampled_from(needed)))

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        forgettable = sorted(self.runner.embeddings - self.scheduler.pinned_images())
        if forgettable:
            self.runner.forget(data.draw(st.sampled_from(forgettable)))

    @rule()
    def step(self) -> None:
        plan = self.scheduler.schedule()
        self.deliver(self.scheduler.commit(plan, self.runner.execute(plan)))

    @rule(data=st.data())
    def step_during_which_one_is_aborted(self, data: st.DataObject) -> None:
        plan = self.scheduler.schedule()
        sampled = self.runner.execute(plan)
        if self.scheduler.requests:
            output = self.scheduler.abort(data.draw(st.sampled_from(sorted(self.scheduler.requests))))
            assert output is not None
            self.deliver([output])
        self.scheduler.check()
        self.deliver(self.scheduler.commit(plan, sampled))

    def deliver(self, outputs: list[StepOutput]) -> None:
        deliver(outputs, self.answers, self.reasons)

    @invariant()
    def everything_agrees(self) -> None:
        self.scheduler.check()
        assert set(self.requests) - set(self.reasons) == set(self.scheduler.requests)

    @invariant()
    def answers_are_those_of_a_request_alone(self) -> None:
        for request_id, answer in self.answers.items():
            alone = answer_alone(self.requests[request_id], 40)
            assert answer == alone[: len(answer)]
            if self.reasons.get(request_id) in (FinishReason.STOP, FinishReason.LENGTH):
                assert answer == alone

    def teardown(self) -> None:
        """Everyone ends soon, with an embedding cache that is full as soon as anything in it is pinned."""
        num_slots = sum(len(request.prompt.token_ids) + 24 for request in self.scheduler.requests.values())
        for _ in range(10 * num_slots):
            if not self.scheduler.has_work:
                break
            for content_hash in sorted(self.runner.embeddings - self.scheduler.pinned_images()):
                self.runner.forget(content_hash)
            for image in self.scheduler.images_needed(ahead=not self.runner.embeddings)[:1]:
                self.runner.encoded(image.content_hash)
            self.step()
            self.scheduler.check()
        assert not self.scheduler.has_work, f"never ended: {self.scheduler.requests}"
        self.answers_are_those_of_a_request_alone()
        assert self.scheduler.blocks.num_referenced == 0


TestEngine = Engine.TestCase
TestEngine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
