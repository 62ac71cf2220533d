"""Answers of the embedded model to random JSON schemas: valid by another validator, and where they are cut off, valid so far."""

import contextlib
import json

import jiter
import jsonschema
import pytest

from engine.config import EngineConfig
from engine.core import Engine
from engine.request import FinishReason, Prompt, SamplingParams, make_cache_keys
from tests.image_fixtures import EMBEDDED, tiny_folder
from tests.random_schemas import random_schema
from vlm_server.guided import json_grammar
from vlm_server.tokenizer import TextTokenizer, load_tokenizer

MAX_TOKENS = 160


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("num_schemas", "max_batch_size"), [pytest.param(6, 4, id="few"), pytest.param(200, 32, id="many", marks=pytest.mark.full)]
)
def test_answers_are_valid_by_their_schema(num_schemas, max_batch_size, temperature):
    tokenizer = TextTokenizer(load_tokenizer(tiny_folder(EMBEDDED)))
    with contextlib.closing(make_engine(max_batch_size)) as engine:
        engine.set_vocabulary(tokenizer.vocabulary())
        answers = answers_to(engine, tokenizer, num_schemas, temperature)

    num_finished = 0
    for seed, (text, reason) in enumerate(answers):
        if reason is FinishReason.STOP:
            num_finished += 1
            jsonschema.validate(json.loads(text), random_schema(seed))
        else:
            assert reason is FinishReason.LENGTH
            assert isinstance(jiter.from_json(text.encode(), partial_mode="trailing-strings"), dict)
    assert num_finished >= 0.8 * num_schemas


def make_engine(max_batch_size: int) -> Engine:
    folder = tiny_folder(EMBEDDED)
    config = EngineConfig(model_folder=str(folder), device="cpu", session_len=1024, max_batch_size=max_batch_size)
    return Engine(config.resolve(json.loads((folder / "config.json").read_text())["text_config"]))


def answers_to(engine: Engine, tokenizer: TextTokenizer, num_schemas: int, temperature: float) -> list[tuple[str, FinishReason]]:
    """Text and end of the answer to each seed's schema."""
    for seed in range(num_schemas):
        schema = random_schema(seed)
        question = f"Answer with JSON by this schema: {json.dumps(schema)}\nJSON: "
        token_ids = tuple(tokenizer.encode(question))
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=temperature, seed=seed, grammar=json_grammar(schema))
        engine.add(str(seed), Prompt(token_ids=token_ids, cache_keys=make_cache_keys(token_ids, (), ())), params)
    token_ids_of: dict[str, list[int]] = {str(seed): [] for seed in range(num_schemas)}
    ends: dict[str, FinishReason] = {}
    while engine.has_work:
        for output in engine.step():
            token_ids_of[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                ends[output.request_id] = output.finish_reason
    return [(tokenizer.decode(token_ids_of[str(seed)]), ends[str(seed)]) for seed in range(num_schemas)]
