"""LMDeploy's JSON template files: what is read, what is refused, and the text that comes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.image_fixtures import tiny_folder
from vlm_server.built_in_templates import BUILT_IN
from vlm_server.chat_template import TemplateError
from vlm_server.role_template import RoleChatTemplate, RoleTemplate, parse_role_template
from vlm_server.template_choice import load_chat_template
from vlm_server.tokenizer import load_tokenizer

WORDS = ("system", "meta_instruction", "eosys", "user", "eoh", "assistant", "eoa", "separator", "tool", "eotool")
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
word_fields = st.dictionaries(st.sampled_from(WORDS), texts | st.none())
turns = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), texts), min_size=1, max_size=6)
HI = [{"role": "user", "content": "hi"}]


def parse(fields: dict[str, Any]) -> RoleTemplate:
    return parse_role_template(json.dumps(fields), BUILT_IN, where="mine.json")


@given(fields=word_fields, turns=turns, adds_prompt=st.booleans())
def test_the_text_is_the_words_around_each_turn(fields: dict[str, str | None], turns: list[tuple[str, str]], adds_prompt: bool) -> None:
    words = {name: fields.get(name) or "" for name in WORDS}
    ends = {"system": words["eosys"], "user": words["eoh"], "assistant": words["eoa"] + words["separator"], "tool": words["eotool"]}

    text = parse(fields).write(turns, add_generation_prompt=adds_prompt)

    opening = words["system"] + words["meta_instruction"] + words["eosys"] if all(role != "system" for role, _ in turns) else ""
    whole = opening + "".join(words[role] + content + ends[role] for role, content in turns)
    if not adds_prompt:
        assert text == whole
    elif turns[-1][0] == "assistant":
        assert text + ends["assistant"] == whole
    else:
        assert text == whole + words["assistant"]


@given(fields=word_fields, name=st.sampled_from(sorted(BUILT_IN)))
def test_a_files_words_take_the_places_of_the_built_in_template_that_it_names(fields: dict[str, str | None], name: str) -> None:
    parsed = parse({**fields, "model_name": name})

    for word in WORDS:
        expected = getattr(BUILT_IN[name], word) if fields.get(word) is None else fields[word]
        assert getattr(parsed, word) == expected
    assert parsed.generation_prompt == (None if fields.get("assistant") is not None else BUILT_IN[name].generation_prompt)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)


@settings(max_examples=300)
@given(fields=st.dictionaries(st.sampled_from([*WORDS, "stop_words", "capability", "model_name", "model_path", "extra"]), json_values))
def test_any_object_is_read_or_refused_by_the_name_of_a_field(fields: dict[str, Any]) -> None:
    complaint = ""
    try:
        parse(fields)
    except ValueError as error:
        complaint = str(error)

    if complaint:
        assert complaint.startswith("mine.json: ")
        assert any(name in complaint for name in fields)
    else:
        assert "extra" not in fields
        assert all(isinstance(fields.get(name), str | None) for name in WORDS)
        assert isinstance(fields.get("stop_words"), list | None)


REFUSED = {
    "no JSON": ("{", "this is not JSON"),
    "deep": ("[" * 100_000, "this is not JSON"),
    "a list": ("[]", "a JSON object is needed, not list"),
    "an unknown field": (
        '{"sytem": "x"}',
        "sytem is no field of a chat template; known are model_name, model_path, system, meta_instruction",
    ),
    "a number": ('{"user": 1}', "user must be a string"),
    "a stop word alone": ('{"stop_words": "</s>"}', "stop_words must be a list of strings"),
    "an empty stop word": ('{"stop_words": [""]}', "stop_words must be a list of strings that are not empty"),
    "a capability": ('{"capability": "talk"}', "capability must be one of chat, completion, infilling, python, not talk"),
    "half a pair": ('{"eoa": "\\ud800"}', "eoa is not Unicode text"),
    "a name": ('{"model_name": 3}', "model_name must be a string"),
    "a path": ('{"model_path": "/x"}', "model_path is not supported"),
}


@pytest.mark.parametrize(("text", "complaint"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_wrong_says_where(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^mine.json: {complaint}"):
        parse_role_template(text, BUILT_IN, where="mine.json")


def test_a_documented_file_is_written_in_order(tmp_path: Path) -> None:
    """Every field of LMDeploy's guide, with its own words."""
    fields = {
        "model_name": "your awesome chat template name",
        "system": "<|im_start|>system\n",
        "meta_instruction": "You are a painter.",
        "eosys": "<|im_end|>\n",
        "user": "<|im_start|>user\n",
        "eoh": "<|im_end|>\n",
        "assistant": "<|im_start|>assistant\n",
        "eoa": "<|im_end|>",
        "separator": "\n",
        "capability": "chat",
        "stop_words": ["<|im_end|>", "Human:"],
    }
    for name in ("mine.json", "mine"):
        (tmp_path / name).write_text(json.dumps(fields), encoding="utf-8")
        loaded = load_chat_template(tmp_path, load_tokenizer(tiny_folder("llama")), chat_template=str(tmp_path / name))

        assert loaded.render([*HI, {"role": "assistant", "content": "Hello."}, *HI]) == (
            "<|im_start|>system\nYou are a painter.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        )
        assert list(loaded.stop_words) == ["<|im_end|>", "Human:"]


def load(chat_template: str | None, **options: Any) -> Any:
    return load_chat_template(tiny_folder("llama"), load_tokenizer(tiny_folder("llama")), chat_template=chat_template, **options)


def test_arguments_take_the_places_of_words() -> None:
    loaded = load("vicuna", chat_template_args='{"user": "Human: ", "assistant": "Bot: ", "stop_words": ["Human:"]}', meta_instruction="S")

    assert loaded.render(HI) == "S Human: hi Bot: "
    assert loaded.stop_words == ("Human:",)


def test_the_default_system_text_is_the_flags_the_arguments_or_the_templates() -> None:
    assert load("qwen").render(HI).startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert load("qwen", meta_instruction="S").render(HI).startswith("<|im_start|>system\nS<|im_end|>\n")
    assert load("qwen", chat_template_args='{"meta_instruction": "T"}').render(HI).startswith("<|im_start|>system\nT<|im_end|>\n")
    own = load("qwen", meta_instruction="S").render([{"role": "developer", "content": "mine"}, *HI])
    assert own.startswith("<|im_start|>system\nmine<|im_end|>\n<|im_start|>user\n")


WRONG_OPTIONS = {
    "arguments of Jinja": ({"chat_template_args": "{}"}, "chat_template_args: a Jinja template has no words"),
    "no JSON": ({"chat_template": "qwen", "chat_template_args": "user=x"}, "chat_template_args: this is not JSON"),
    "a name in the arguments": (
        {"chat_template": "qwen", "chat_template_args": '{"model_name": "x"}'},
        "chat_template_args: model_name is no",
    ),
    "two system texts": (
        {"chat_template": "qwen", "chat_template_args": '{"meta_instruction": "a"}', "meta_instruction": "b"},
        "chat_template_args: meta_instruction differs from --meta-instruction",
    ),
}


@pytest.mark.parametrize(("options", "complaint"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_arguments_that_would_have_no_effect_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^{complaint}"):
        load(**{"chat_template": None, **options})


def test_hf_is_the_models_own_template() -> None:
    assert load("hf").render(HI) == load(None).render(HI)


@pytest.mark.parametrize("capability", ["completion", "python"])
def test_a_template_of_a_completing_model_passes_the_one_text_on(capability: str) -> None:
    loaded = load("codellama", chat_template_args=json.dumps({"capability": capability}))

    assert loaded.render([{"role": "user", "content": "def f("}]) == "def f("
    for talk in (HI * 2, [{"role": "system", "content": "x"}, *HI]):
        with pytest.raises(TemplateError, match=f"messages: .*capability {capability}.* one user message"):
            loaded.render(talk)


def test_a_template_that_fills_in_writes_what_is_around_the_hole_and_ends_at_its_end_word() -> None:
    loaded = load("codellama", chat_template_args='{"capability": "infilling"}')

    assert loaded.render([{"role": "user", "content": "def f():\n    <FILL>\n    return x"}]) == (
        "<PRE> def f():\n     <SUF>\n    return x <MID>"
    )
    assert loaded.stop_words == ("<EOT>",)
    for text in ("no hole", "two <FILL> holes <FILL>"):
        with pytest.raises(TemplateError, match="one <FILL> in it"):
            loaded.render([{"role": "user", "content": text}])


def test_what_there_are_no_words_for_is_refused() -> None:
    template = RoleChatTemplate(BUILT_IN["qwen"])
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}

    with pytest.raises(TemplateError, match=r"^tools: "):
        template.render(HI, tools=[tool])
    with pytest.raises(TemplateError, match=r"^tools: "):
        template.render([*HI, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}])
    with pytest.raises(TemplateError, match=r"^chat_template_kwargs: "):
        template.render(HI, template_kwargs={"enable_thinking": True})


def test_parts_are_lines_and_pictures_stand_where_they_are_sent() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b"},
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": "c"},
    ]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}, {"role": "user", "content": []}]

    assert RoleChatTemplate(BUILT_IN["base"], placeholder="<i>", picture_gap="\n").render(talk) == "a\nb\n<i>\n<i>\nc"
    assert RoleChatTemplate(BUILT_IN["base"], placeholder="<i>", picture_gap="").render(talk) == "a\nb<i><i>c"
