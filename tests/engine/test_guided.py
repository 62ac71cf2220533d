"""Grammars in the engine: every answer follows its own, alone, batched or preempted, and a bad one ends its own request only."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from threading import Event

import numpy as np
import pytest
from llguidance import LLMatcher

from engine.config import EngineConfig
from engine.core import Engine
from engine.guided import MAX_COMPILED, MAX_GRAMMAR_BYTES, GrammarError, Guides, check_grammar
from engine.request import FinishReason, InvalidRequestError, Prompt, RequestFailure, SamplingParams, make_cache_keys
from tests.tiny_models import write_tiny
from vlm_server.tokenizer import TextTokenizer, load_tokenizer

WORD = LLMatcher.grammar_from_regex("[a-z]{3,8}")
LONG = LLMatcher.grammar_from_regex("[a-z]{60}")
AMBIGUOUS = 'start: s\ns: s s s s | s s s | s s | /[a-z ]/ | /[a-m]/ | ""'
NUMBERS = LLMatcher.grammar_from_json_schema(
    {"type": "array", "items": {"type": "integer", "minimum": 10, "maximum": 99}, "minItems": 2, "maxItems": 4},
    overrides={"whitespace_flexible": False},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tokenizer(folder) -> TextTokenizer:
    return TextTokenizer(load_tokenizer(folder))


@pytest.fixture
def engine(folder, tokenizer) -> Iterator[Engine]:
    engine = make_engine(folder, tokenizer)
    yield engine
    engine.scheduler.check()
    assert len(engine.guides) == 0, "a grammar outlived its request"
    engine.close()


@pytest.fixture
def guides(tokenizer) -> Iterator[Guides]:
    guides = Guides(vocab_size=400, eos_token_ids=[2])
    guides.vocabulary = tokenizer.vocabulary()
    yield guides
    guides.close()


def make_engine(folder, tokenizer, **settings) -> Engine:
    config = EngineConfig(model_folder=str(folder), device="cpu", session_len=256, **{"max_batch_size": 16, **settings})
    engine = Engine(config.resolve(json.loads((folder / "config.json").read_text())))
    engine.set_vocabulary(tokenizer.vocabulary())
    return engine


def text_prompt(*token_ids: int) -> Prompt:
    return Prompt(token_ids=token_ids, cache_keys=make_cache_keys(token_ids, (), ()))


def run(engine: Engine) -> dict[str, list]:
    """All outputs by request until nothing is left to do."""
    outputs: dict[str, list] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def text_of(tokenizer: TextTokenizer, outputs: list) -> str:
    return tokenizer.decode([token_id for output in outputs for token_id in output.token_ids])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_row_of_a_batch_follows_its_own_grammar_and_free_rows_none(engine, tokenizer, temperature):
    alone = SamplingParams(temperature=temperature, max_tokens=12, seed=7)
    engine.add("free before", text_prompt(5, 6, 7), alone)
    [before] = run(engine).values()

    engine.add("free", text_prompt(5, 6, 7), alone)
    for index in range(6):
        grammar = WORD if index % 2 else NUMBERS
        params = SamplingParams(temperature=temperature, max_tokens=60, seed=index, grammar=grammar)
        engine.add(f"guided {index}", text_prompt(5, 6, 7 + index), params)
    outputs = run(engine)

    assert text_of(tokenizer, outputs["free"]) == text_of(tokenizer, before)
    for index in range(6):
        text = text_of(tokenizer, outputs[f"guided {index}"])
        assert outputs[f"guided {index}"][-1].finish_reason is FinishReason.STOP
        if index % 2:
            assert re.fullmatch("[a-z]{3,8}", text)
        else:
            assert 2 <= len(json.loads(text)) <= 4
            assert all(10 <= number <= 99 for number in json.loads(text))


def test_a_preempted_row_goes_on_where_it_was_in_its_grammar(folder, tokenizer):
    """Eight blocks for three rows that need four or five each."""
    engine = make_engine(folder, tokenizer, cache_max_entry_count=8, cache_block_seq_len=16, max_prefill_token_num=64)
    for index in range(3):
        engine.add(str(index), text_prompt(*range(20 + index, 40 + index)), SamplingParams(max_tokens=64, seed=index, grammar=LONG))

    outputs = run(engine)

    assert engine.scheduler.num_preemptions > 0
    for index in range(3):
        assert re.fullmatch("[a-z]{60}", text_of(tokenizer, outputs[str(index)]))
    engine.close()


def test_an_answer_that_is_cut_off_is_the_beginning_of_one(engine, tokenizer):
    engine.add("cut", text_prompt(5, 6, 7), SamplingParams(max_tokens=3, seed=1, grammar=LONG))

    outputs = run(engine)["cut"]

    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert re.fullmatch("[a-z]{3,60}", text_of(tokenizer, outputs))


def test_an_abort_while_the_grammar_is_compiled_leaves_nothing(engine, monkeypatch):
    never: Future[None] = Future()
    begin = engine.guides.begin
    monkeypatch.setattr(engine.guides, "begin", lambda *args, **kwargs: begin(*args, **kwargs) and never)
    engine.add("held", text_prompt(5, 6, 7), SamplingParams(grammar=WORD))

    assert engine.step() == []  # it is held, and the step waits a moment only
    assert engine.abort("held").finish_reason is FinishReason.ABORT
    assert not engine.has_work


def test_a_grammar_that_cannot_be_compiled_ends_its_request_only(engine, tokenizer):
    engine.add("bad", text_prompt(5, 6, 7), SamplingParams(max_tokens=60, grammar="start: /(/"))
    engine.add("good", text_prompt(5, 6, 7), SamplingParams(max_tokens=60, grammar=WORD))

    outputs = run(engine)

    assert outputs["bad"][-1].finish_reason is FinishReason.ERROR
    assert outputs["bad"][-1].is_refusal
    assert "grammar" in outputs["bad"][-1].error
    assert "regex" in outputs["bad"][-1].error
    assert re.fullmatch("[a-z]{3,8}", text_of(tokenizer, outputs["good"]))


def test_a_grammar_that_breaks_its_library_ends_guided_requests_only(engine, tokenizer, monkeypatch):
    def panic(guide, vocabulary):
        raise BaseException("a panic")  # as an extension's are

    monkeypatch.setattr(engine.guides, "_compile", panic)
    engine.add("guided", text_prompt(5, 6, 7), SamplingParams(max_tokens=3, grammar=WORD))
    engine.add("free", text_prompt(5, 6, 7), SamplingParams(max_tokens=3))

    outputs = run(engine)

    assert outputs["guided"][-1].finish_reason is FinishReason.ERROR
    assert not outputs["guided"][-1].is_refusal
    assert "a panic" in outputs["guided"][-1].error
    assert outputs["free"][-1].finish_reason is not FinishReason.ERROR


def test_an_ambiguous_grammar_ends_its_request_only_and_soon(engine, tokenizer):
    """Regression: 40 bytes took a second of each step, and then ended the guided requests of all others."""
    params = SamplingParams(max_tokens=200, grammar=AMBIGUOUS, logit_bias={tokenizer.token_id("a"): 100.0})
    for index in range(4):
        engine.add(f"ambiguous {index}", text_prompt(5, 6, 7 + index), params)
    engine.add("good", text_prompt(5, 6, 7), SamplingParams(max_tokens=60, grammar=WORD))

    outputs = run(engine)

    for index in range(4):
        last = outputs[f"ambiguous {index}"][-1]
        assert (last.finish_reason, last.is_refusal) == (FinishReason.ERROR, True)
        assert "Too many items (limit 5000" in last.error
    assert re.fullmatch("[a-z]{3,8}", text_of(tokenizer, outputs["good"]))


def test_a_grammar_whose_masks_take_too_long_in_all_ends_its_request_only(engine, tokenizer, monkeypatch):
    compute = engine.guides._compute

    def slow(guide):
        guide.used_s += 0.5 * (guide.grammar == LONG)
        compute(guide)

    monkeypatch.setattr(engine.guides, "_compute", slow)
    engine.add("slow", text_prompt(5, 6, 7), SamplingParams(max_tokens=60, grammar=LONG))
    engine.add("good", text_prompt(5, 6, 7), SamplingParams(max_tokens=60, grammar=WORD))

    outputs = run(engine)

    assert (outputs["slow"][-1].finish_reason, outputs["slow"][-1].is_refusal) == (FinishReason.ERROR, True)
    assert "more processor time than the allowed 2 s and 2 ms for each token" in outputs["slow"][-1].error
    assert len(text_of(tokenizer, outputs["slow"])) >= 4
    assert re.fullmatch("[a-z]{3,8}", text_of(tokenizer, outputs["good"]))


def test_a_guide_waits_for_no_other_ones_mask(guides, monkeypatch):
    """Regression: all of a step's masks were one piece of work."""
    for request_id in ("quick", "broken", "slow"):
        guides.begin(request_id, WORD).result()
    may_go_on, follow = Event(), guides._follow

    def follow_as_named(guide, token_id):
        if guide is guides._guides["broken"]:
            raise BaseException("a panic")
        assert guide is not guides._guides["slow"] or may_go_on.wait(60)
        follow(guide, token_id)

    monkeypatch.setattr(guides, "_follow", follow_as_named)
    guides.advance(dict.fromkeys(("quick", "broken", "slow"), 70))
    guides._guides["quick"].work.result(60)
    guides._guides["broken"].work.exception(60)

    monkeypatch.setattr("engine.guided.WAIT_S", 0.0)
    masks, failures = guides.masks(["slow", "quick", "broken"])
    may_go_on.set()
    assert list(masks) == ["quick"]
    assert failures["slow"] == RequestFailure("the grammar: its mask took longer than 0 s")
    assert "a panic" in failures["broken"].message


def test_a_grammar_that_failed_is_compiled_anew_and_each_tenants_apart(guides):
    """Regression: the copies of a compiled grammar have their lexer in common, and once that was full every later one failed."""
    for tenant in ("one", "other"):
        guides.begin(tenant, WORD, tenant=tenant).result()
    one, other = guides._compiled[("one", WORD)], guides._compiled[("other", WORD)]
    guides._guides["one"].error = RequestFailure("Lexer has too many states", is_refusal=True)

    assert list(guides.masks(["one", "other"])[1]) == ["one"]

    guides.begin("again", WORD, tenant="one").result()
    assert guides._compiled[("one", WORD)] is not one
    assert guides._compiled[("other", WORD)] is other
    assert guides.masks(["again"])[1] == {}


def test_a_compiled_grammar_is_kept_for_the_requests_tenant(engine):
    engine.add("request", replace(text_prompt(5, 6, 7), tenant="someone"), SamplingParams(max_tokens=60, grammar=WORD))

    run(engine)

    assert list(engine.guides._compiled) == [("someone", WORD)]


def test_tenants_take_turns_at_compiling_and_what_was_given_up_is_not_compiled(guides, monkeypatch):
    """Regression: one thread compiled the grammars of requests in their order, those of requests that had ended too."""
    compiled, may_go_on, has_begun = [], Event(), Event()

    def compile_slowly(guide, vocabulary):
        has_begun.set()
        assert may_go_on.wait(60)
        compiled.append(guide.grammar)

    monkeypatch.setattr(guides, "_compile", compile_slowly)
    first = guides.begin("first", "first", tenant="greedy")
    assert has_begun.wait(60)
    works = {name: guides.begin(name, name, tenant="greedy") for name in ("second", "third", "fourth")}
    works["other"] = guides.begin("other", "other", tenant="other")
    for name in ("third", "fourth"):
        guides.end(name)
    may_go_on.set()
    for work in (first, works["second"], works["other"]):
        work.result(60)
    guides._compiler.submit(lambda: None).result(60)  # behind all that could follow

    assert compiled == ["first", "second", "other"]
    assert works["third"].cancelled()
    assert works["fourth"].cancelled()
    assert guides._queues == {}


def test_without_a_vocabulary_a_grammar_is_refused_and_the_request_is_gone(folder, tokenizer):
    engine = make_engine(folder, tokenizer)
    engine.guides.vocabulary = None

    with pytest.raises(InvalidRequestError, match="vocabulary"):
        engine.add("request", text_prompt(5), SamplingParams(grammar=WORD))

    assert not engine.has_work
    engine.close()


def test_special_tokens_are_never_part_of_a_text(tokenizer):
    """Only the bytes of ordinary tokens count."""
    guides = Guides(vocab_size=400, eos_token_ids=[tokenizer.token_id("<|im_end|>")])
    guides.vocabulary = tokenizer.vocabulary()
    guides.begin("request", LLMatcher.grammar_from_regex("[^a]+a"))

    masks, errors = guides.masks(["request"])

    allowed = np.unpackbits(masks["request"].view(np.uint8), bitorder="little")
    assert errors == {}
    assert allowed[tokenizer.token_id("<")]
    assert not any(allowed[tokenizer.token_id(token)] for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    guides.close()


def test_a_vocabulary_shorter_than_the_logits_allows_none_of_the_padding(tokenizer):
    guides = Guides(vocab_size=500, eos_token_ids=[2, 1000])
    guides.vocabulary = tokenizer.vocabulary()
    guides.begin("request", LLMatcher.grammar_from_regex("(?s:.*)"))

    masks, errors = guides.masks(["request"])

    allowed = np.unpackbits(masks["request"].view(np.uint8), bitorder="little")
    assert errors == {}
    assert allowed[2]
    assert allowed[:400].sum() > 250
    assert not allowed[400:].any()
    guides.close()


def test_a_tokenizer_of_an_unknown_kind_ends_guided_requests_only(engine, tokenizer):
    engine.set_vocabulary("{}")
    engine.add("guided", text_prompt(5, 6, 7), SamplingParams(max_tokens=3, grammar=WORD))
    engine.add("free", text_prompt(5, 6, 7), SamplingParams(max_tokens=3))

    outputs = run(engine)

    assert outputs["guided"][-1].finish_reason is FinishReason.ERROR
    assert "tokenizer" in outputs["guided"][-1].error
    assert outputs["free"][-1].finish_reason is FinishReason.LENGTH


def test_the_last_few_grammars_are_compiled_once(tokenizer):
    guides = Guides(vocab_size=400, eos_token_ids=[2])
    guides.vocabulary = tokenizer.vocabulary()
    for index in range(3 * MAX_COMPILED):
        guides.begin(str(index), LLMatcher.grammar_from_regex(f"a{{{index + 1}}}")).result()

    assert len(guides._compiled) == MAX_COMPILED
    guides.close()


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("start: /(/", "unclosed group"),
        ("x" * (MAX_GRAMMAR_BYTES + 1), "at most 262144"),
        (LLMatcher.grammar_from_json_schema({"not": {}}), "not"),
        (LLMatcher.grammar_from_json_schema({"$ref": "#/nowhere"}), "nowhere"),
    ],
)
def test_what_is_wrong_with_a_grammar_is_said(grammar, message):
    with pytest.raises(GrammarError, match=message):
        check_grammar(grammar)
    check_grammar(WORD)


FOLLOW = """
import sys
from engine.guided import Guides, check_grammar
grammar = sys.stdin.read()
check_grammar(grammar)
guides = Guides(vocab_size=400, eos_token_ids=[2])
guides.vocabulary = open(sys.argv[1]).read()
guides.begin("request", grammar).result(60)
masks, errors = guides.masks(["request"])
guides.close()
print(sum(bin(word & 0xFFFFFFFF).count("1") for word in masks["request"].tolist()), errors)
"""


def rules(num_rules: int) -> str:
    return "start: r0\n" + "".join(f"r{index}: r{index + 1}\n" for index in range(num_rules)) + f'r{num_rules}: "a"\n'


def references(num_references: int) -> str:
    definitions = {f"d{index}": {"$ref": f"#/$defs/d{index + 1}"} for index in range(num_references)}
    return LLMatcher.grammar_from_json_schema({"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{num_references}": {"const": "a"}}})


@pytest.mark.parametrize("grammar", [rules(18_000), references(7_000)], ids=["rules", "references"])
def test_a_chain_of_many_rules_ends_no_process(grammar, tokenizer, tmp_path):
    """Regression: the library recurses into them, and 3000 were a segmentation fault of the server."""
    assert 200_000 < len(grammar) <= MAX_GRAMMAR_BYTES
    (tmp_path / "vocabulary").write_text(tokenizer.vocabulary())

    command = [sys.executable, "-c", FOLLOW, str(tmp_path / "vocabulary")]
    process = subprocess.run(command, input=grammar, capture_output=True, text=True, timeout=120)

    assert (process.returncode, process.stdout) == (0, "1 {}\n"), process.stderr
