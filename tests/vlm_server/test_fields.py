"""Which fields of a request have an effect, which are refused by name, which are warned about."""

import json
from typing import Any

import pytest
import requests

from engine.request import SamplingParams
from tests.contract.running import RunningServer, fake_config, running_server
from tests.vlm_server.byte_tokenizer import EOS, VOCAB_SIZE
from vlm_server.sampling import SamplingDefaults

HELLO = [{"role": "user", "content": "hi"}]


def post_chat(server: RunningServer, **fields: Any) -> requests.Response:
    body = json.dumps({"model": server.model, "messages": HELLO, **fields})  # NaN included, which requests' own json= refuses
    return requests.post(f"{server.url}/v1/chat/completions", data=body, headers={"content-type": "application/json"}, timeout=10)


def post_completion(server: RunningServer, **fields: Any) -> requests.Response:
    return requests.post(f"{server.url}/v1/completions", json={"model": server.model, "prompt": "hi", **fields}, timeout=10)


def sampled_with(server: RunningServer) -> SamplingParams:
    """The parameters that the engine got last."""
    return server.backend.engine.requests[-1][1]


UNSUPPORTED_IN_CHAT = {
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "verbosity": "low",
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {},
    "do_preprocess": False,
    "input_ids": [1],
    "image_data": "x",
    "media_io_kwargs": {"image": {"a": 1}},
    "return_logprob": True,
    "return_token_ids": True,
    "return_routed_experts": True,
    "migration_request": {},
    "with_cache": True,
    "preserve_cache": True,
    "best_of": 2,
    "echo": True,
    "suffix": "x",
}
UNSUPPORTED_ANYWHERE = {
    "spaces_between_special_tokens": False,
    "repetition_ngram_size": 2,
    "repetition_ngram_threshold": 2,
    "adapter_name": "x",
    "prompt_cache_retention": "24h",
}


@pytest.mark.parametrize("field", [*UNSUPPORTED_IN_CHAT, *UNSUPPORTED_ANYWHERE])
def test_chat_refuses_a_field_that_it_does_not_support_by_name(server: RunningServer, field: str) -> None:
    response = post_chat(server, **{field: (UNSUPPORTED_IN_CHAT | UNSUPPORTED_ANYWHERE)[field]})

    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert field in error["message"]


@pytest.mark.parametrize("field", UNSUPPORTED_ANYWHERE)
def test_completions_refuse_a_field_that_they_do_not_support_by_name(server: RunningServer, field: str) -> None:
    response = post_completion(server, **{field: UNSUPPORTED_ANYWHERE[field]})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


NO_OPS: dict[str, Any] = {
    "kwargs": {"session_id": 1},
    "user": "me",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "stop": False,
    "session_id": -1,
    "tools": [],
    "tool_choice": "auto",
    "add_generation_prompt": True,
    "continue_final_message": False,
    "parallel_tool_calls": True,
    "functions": [],
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "mm_processor_kwargs": {},
    "num_beams": 1,
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "top_logprobs": 0,
    "logit_bias": {},
    "stream_options": {"include_obfuscation": False},
    "temperature": None,
    "max_tokens": None,
    "n": None,
    "stream": None,
    "seed": None,
    "reasoning_effort": None,
}


@pytest.mark.parametrize("field", NO_OPS)
def test_a_listed_no_op_is_accepted_without_a_warning(server: RunningServer, field: str) -> None:
    response = post_chat(server, **{field: NO_OPS[field]})

    assert response.status_code == 200
    assert "warnings" not in response.json()


def test_a_field_that_no_api_documents_gives_a_warning(server: RunningServer) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {}}]}

    warnings = post_chat(server, favourite_colour=["a"], messages=[message]).json()["warnings"]

    assert [warning.split(":")[0] for warning in warnings] == ["favourite_colour", "messages[0].content[0].cache_control"]


def test_the_warnings_are_in_the_last_chunk_of_a_stream(server: RunningServer) -> None:
    text = post_chat(server, favourite_colour=["a"], stream=True).text

    events = [line for line in text.splitlines() if line]
    assert "warnings" in events[-2]
    assert "warnings" not in "".join(events[:-2])


def test_strict_fields_refuse_what_no_api_documents() -> None:
    with running_server(fake_config(strict_fields=True)) as server:
        response = post_chat(server, favourite_colour=["a"])

        assert response.status_code == 400
        assert response.json()["error"]["param"] == "favourite_colour"
        assert response.json()["error"]["code"] == "unknown_parameter"
        assert post_chat(server, user="me").status_code == 200


def tool(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def pictured(*, image: dict[str, Any] | None = None, **fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x", **(image or {})}, **fields}]}]


TOOL = tool(parameters={"type": "object", "properties": {"a": {"type": "integer"}}})
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
DEEP = nested(100)

INVALID: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "pope", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]}, "messages[0].reasoning_content"),
    ({"messages": [{"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}]}, "messages[0].tool_calls[0].type"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0].image_url.url"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x", "detail": "best"}}]}]},
        "messages[0].content[0].image_url.detail",
    ),
    ({"messages": pictured(image={"detail": "original"})}, "messages[0].content[0].image_url.detail"),
    ({"messages": pictured(image={"min_pixels": 0})}, "messages[0].content[0].image_url.min_pixels"),
    ({"messages": pictured(image={"max_pixels": 1.5})}, "messages[0].content[0].image_url.max_pixels"),
    ({"messages": pictured(max_pixels=-1)}, "messages[0].content[0].max_pixels"),
    ({"messages": pictured(min_pixels="many")}, "messages[0].content[0].min_pixels"),
    ({"messages": pictured(resized_height=28)}, "messages[0].content[0].resized_height"),
    ({"messages": pictured(image={"max_dynamic_patch": 6})}, "messages[0].content[0].image_url.max_dynamic_patch"),
    ({"mm_processor_kwargs": {"max_pixels": 3}}, "mm_processor_kwargs.max_pixels"),
    ({"mm_processor_kwargs": {"do_resize": False}}, "mm_processor_kwargs.do_resize"),
    ({"mm_processor_kwargs": {"image": {"fps": 1}}}, "mm_processor_kwargs.image.fps"),
    ({"mm_processor_kwargs": {"video": {"max_pixels": 1}}}, "mm_processor_kwargs.video"),
    ({"mm_processor_kwargs": {"size": {"height": 28}}}, "mm_processor_kwargs.size.height"),
    ({"mm_processor_kwargs": {"size": {"longest_edge": -1}}}, "mm_processor_kwargs.size.longest_edge"),
    ({"mm_processor_kwargs": {"do_pan_and_scan": [1]}}, "mm_processor_kwargs.do_pan_and_scan"),
    ({"mm_processor_kwargs": {"max_pixels": 9}, "messages": "raw"}, "mm_processor_kwargs"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].function"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"min_tokens": 1, "min_new_tokens": 2}, "min_new_tokens"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids[0]"),
    ({"seed": 2**64}, "seed"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {f"{token_id:0{width}}": 1 for token_id in range(256) for width in range(3, 8)}}, "logit_bias"),
    ({"chat_template_kwargs": {"chat_template": "{{ x }}"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"not a name": 1}}, "chat_template_kwargs"),
    ({"stream_options": {"include_usage": "maybe"}}, "stream_options.include_usage"),
    ({"chat_template_kwargs": {"x": DEEP}}, "chat_template_kwargs"),
    ({"reasoning_effort": "enormous"}, "reasoning_effort"),
    ({"tools": {}}, "tools"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": "get weather"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f" * 65}}]}, "tools[0].function.name"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": f"f{number}"}} for number in range(129)]}, "tools"),
    ({"tools": [tool(description="x" * (1 << 18))]}, "tools"),
    ({"tools": [tool(description="\ud800")]}, "tools[0].function.description"),
    ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters"),
    ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters"),
    ({"tools": [tool(parameters={"properties": []})]}, "tools[0].function.parameters"),
    ({"tools": [tool(parameters={"properties": {"a": 5}})]}, "tools[0].function.parameters"),
    ({"tools": [tool(parameters={"required": "a"})]}, "tools[0].function.parameters"),
    ({"tools": [tool(parameters={"properties": {"a": {"x": DEEP}}})]}, "tools[0].function.parameters"),
    ({"tools": [tool(parameters={"description": "\ud800"})]}, "tools[0].function.parameters"),
    ({"tools": [TOOL], "messages": "raw"}, "tools"),
    ({"tool_choice": "must"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
        "tool_choice.allowed_tools.tools",
    ),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"continue_final_message": True, "messages": "raw"}, "continue_final_message"),
    ({"continue_final_message": True, "messages": [{"role": "assistant", "content": ""}]}, "continue_final_message"),
    ({"continue_final_message": True, "messages": [{"role": "assistant", "content": "x", "tool_calls": [CALL]}]}, "continue_final_message"),
    (
        {"continue_final_message": True, "add_generation_prompt": True, "messages": [{"role": "assistant", "content": "x"}]},
        "continue_final_message",
    ),
]


@pytest.mark.parametrize(("fields", "param"), INVALID, ids=[str(fields)[:60] for fields, _ in INVALID])
def test_a_bad_value_is_refused_with_the_fields_path(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    response = post_chat(server, **fields)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert response.json()["message"].startswith(param)
    assert not server.backend.engine.requests


def test_a_token_id_that_no_vocabulary_has_is_refused(server: RunningServer) -> None:
    response = post_completion(server, prompt=[[1, 2], [10**30]])

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt[1][0]"


@pytest.mark.parametrize(
    ("kind", "medium"), [("input_audio", "audio"), ("audio_url", "audio"), ("video_url", "video"), ("file", "file"), ("hologram", "text")]
)
def test_parts_of_other_media_are_refused_by_name(server: RunningServer, kind: str, medium: str) -> None:
    response = post_chat(server, messages=[{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": kind, kind: {}}]}])

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[0].content[1]"
    assert medium in response.json()["error"]["message"]


def test_every_sampling_field_reaches_the_engine(server: RunningServer) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 7,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "seed": 11,
        "ignore_eos": True,
        "stop_token_ids": [3],
    }

    response = post_chat(server, **fields, min_new_tokens=2, max_tokens=9, logit_bias={"5": -100}, logprobs=True, top_logprobs=3)

    assert response.status_code == 200
    expected = {**fields, "min_tokens": 2, "max_tokens": 9, "logit_bias": {5: -100.0}, "logprobs": 3, "stop_token_ids": (3,)}
    assert sampled_with(server) == SamplingParams(**expected)  # type: ignore[arg-type]


def test_max_completion_tokens_wins_over_max_tokens(server: RunningServer) -> None:
    post_chat(server, max_tokens=9, max_completion_tokens=4)

    assert sampled_with(server).max_tokens == 4


def test_choices_are_seeded_one_after_the_other(server: RunningServer) -> None:
    choices = post_chat(server, n=3, seed=5).json()["choices"]

    assert [choice["message"]["content"] for choice in choices] == ["seed 5", "seed 6", "seed 7"]


def test_the_prompt_is_counted_once_and_the_choices_are_summed(server: RunningServer) -> None:
    one, three = (post_chat(server, n=n, max_tokens=4).json()["usage"] for n in (1, 3))

    assert three["prompt_tokens"] == one["prompt_tokens"]
    assert three["completion_tokens"] == 3 * one["completion_tokens"] == 12


def test_a_chat_fills_the_window_by_default_and_a_completion_has_16_tokens(server: RunningServer) -> None:
    post_chat(server)
    assert sampled_with(server).max_tokens is None

    post_completion(server)
    assert sampled_with(server).max_tokens == 16


def test_absent_fields_are_plain_without_a_generation_config(server: RunningServer) -> None:
    post_chat(server)

    assert sampled_with(server) == SamplingParams(temperature=1.0, top_p=1.0, top_k=0)


def test_absent_fields_take_the_checkpoints_generation_config() -> None:
    values = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1, "do_sample": True, "eos_token_id": 2}

    assert SamplingDefaults.from_generation_config(values) == SamplingDefaults(
        temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.1
    )


def test_do_sample_false_in_the_generation_config_is_greedy_until_a_request_says_otherwise(tmp_path: Any) -> None:
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')

    with running_server(fake_config(generation_config=str(tmp_path))) as server:
        post_chat(server)
        assert sampled_with(server).temperature == 0.0
        post_chat(server, temperature=0.3)
        assert sampled_with(server).temperature == 0.3


def test_lmdeploys_old_defaults_can_be_chosen() -> None:
    with running_server(fake_config(generation_config="lmdeploy")) as server:
        post_chat(server)

        assert sampled_with(server) == SamplingParams(temperature=0.7, top_p=1.0, top_k=40)


def test_special_tokens_and_stop_strings_can_be_shown(server: RunningServer) -> None:
    server.backend.engine.script = lambda prompt, params: [*b"one", EOS]

    plain = post_chat(server).json()["choices"][0]["message"]["content"]
    shown = post_chat(server, skip_special_tokens=False, include_stop_str_in_output=True).json()["choices"][0]["message"]["content"]
    stopped = post_chat(server, stop="n", include_stop_str_in_output=True).json()["choices"][0]["message"]["content"]

    assert (plain, shown, stopped) == ("one", "one</s>", "on")


def test_template_variables_reach_the_chat_template(server: RunningServer) -> None:
    kwargs = {"style": "brief", "reasoning_effort": "low"}
    response = post_chat(server, enable_thinking=False, reasoning_effort="high", chat_template_kwargs=kwargs)

    assert server.backend.pipeline.template_kwargs == {"enable_thinking": False, "style": "brief", "reasoning_effort": "low"}
    assert [warning.split(":")[0] for warning in response.json()["warnings"]] == ["enable_thinking", "reasoning_effort"]


def test_template_variables_that_the_template_has_give_no_warning(server: RunningServer) -> None:
    server.backend.pipeline.template.text = "{{ enable_thinking }} {{ reasoning_effort }}"

    assert "warnings" not in post_chat(server, enable_thinking=False, reasoning_effort="high").json()


def test_a_plain_string_skips_the_chat_template(server: RunningServer) -> None:
    post_chat(server, messages="raw text")

    assert bytes(server.backend.engine.requests[-1][0].token_ids) == b"raw text"


def test_completion_log_probabilities_follow_openai(server: RunningServer) -> None:
    server.backend.engine.script = lambda prompt, params: [*"a你".encode(), EOS]

    logprobs = post_completion(server, logprobs=1).json()["choices"][0]["logprobs"]

    assert logprobs["tokens"] == ["a", "bytes:\\xe4", "bytes:\\xbd", "bytes:\\xa0"]
    assert logprobs["text_offset"] == [0, 1, 1, 1]
    assert logprobs["top_logprobs"][0] == {"x": -0.25, "a": -1.5}


def test_chat_log_probabilities_have_the_sampled_token_in_its_place(server: RunningServer) -> None:
    content = post_chat(server, logprobs=True, top_logprobs=3, max_tokens=1).json()["choices"][0]["logprobs"]["content"]

    assert [(entry["token"], entry["logprob"]) for entry in content[0]["top_logprobs"]] == [("x", -0.25), ("H", -1.5), ("�", -9999.0)]
    assert content[0]["bytes"] == [72]


def test_tokens_of_a_stop_string_have_no_log_probabilities(server: RunningServer) -> None:
    server.backend.engine.script = lambda prompt, params: [*b"one STOP two", EOS]

    content = post_chat(server, logprobs=True, stop="STOP").json()["choices"][0]["logprobs"]["content"]

    assert "".join(entry["token"] for entry in content) == "one "


@pytest.mark.parametrize(
    ("fields", "temperature", "num_beams"),
    [
        ({}, 1.0, 1),
        ({"do_sample": False, "temperature": 0.7}, 0.0, 1),
        ({"do_sample": True}, 1.0, 1),
        ({"num_beams": 1}, 1.0, 1),
        ({"num_beams": 4}, 0.0, 4),
        ({"num_beams": 4, "do_sample": True}, 1.0, 4),
        ({"num_beams": 4, "temperature": 0.7, "top_k": 40}, 0.7, 4),
        ({"num_beams": 4, "top_p": 0.9}, 1.0, 4),
        ({"num_beams": 4, "temperature": 0}, 0.0, 4),
        ({"num_beams": 4, "temperature": 0.7, "do_sample": False}, 0.0, 4),
    ],
)
def test_beams_are_sampled_only_on_demand(server: RunningServer, fields: dict[str, Any], temperature: float, num_beams: int) -> None:
    for post in (post_chat, post_completion):
        assert post(server, **fields).status_code == 200

        assert (sampled_with(server).temperature, sampled_with(server).num_beams) == (temperature, num_beams)


@pytest.mark.parametrize("fields", [{"num_beams": 0}, {"num_beams": 33}, {"num_beams": 2, "n": 2}])
def test_a_number_of_beams_that_cannot_be_is_refused(server: RunningServer, fields: dict[str, Any]) -> None:
    response = post_chat(server, **fields)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "num_beams"
