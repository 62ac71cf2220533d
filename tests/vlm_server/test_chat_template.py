import json
from pathlib import Path
from typing import Any

import pytest

from tests.image_fixtures import tiny_folder
from vlm_server.chat_template import ChatTemplate, TemplateError
from vlm_server.jinja_process import JinjaProcess
from vlm_server.jinja_worker import RenderLimits
from vlm_server.template_choice import load_chat_template
from vlm_server.tokenizer import load_tokenizer

TEXT_ONLY = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
PARTS_ONLY = (
    "{% for m in messages %}[{{ m['role'] }}]{% for p in m['content'] %}"
    "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endfor %}"
)
BOTH = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}{% endfor %}"
)
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the first message must be the user’s') }}{% endif %}ok"
CALLS = "{% for m in messages %}{% for c in m['tool_calls'] or [] %}{{ c['function']['arguments']['city'] }}{% endfor %}{% endfor %}"
PARTS = [{"type": "text", "text": "See"}, {"type": "image"}, {"type": "text", "text": "How many?"}]


JINJA = JinjaProcess()  # one for all tests: it takes a second to start


def template(source: Any, **options: Any) -> ChatTemplate:
    return ChatTemplate(load_tokenizer(tiny_folder("llama")), source, placeholder="<image>", process=JINJA, **options)


@pytest.mark.parametrize(
    ("source", "text"), [(TEXT_ONLY, "See\n<image>\nHow many?"), (PARTS_ONLY, "See<image>How many?"), (BOTH, "See<image>How many?")]
)
def test_parts_are_written_by_every_kind_of_template(source: str, text: str) -> None:
    assert template(source).render([{"role": "user", "content": PARTS}]) == f"[user]{text}"


@pytest.mark.parametrize("source", [TEXT_ONLY, PARTS_ONLY, BOTH])
def test_strings_are_written_by_every_kind_of_template(source: str) -> None:
    assert template(source).render([{"role": "user", "content": "How many?"}]) == "[user]How many?"


@pytest.mark.parametrize("source", [TEXT_ONLY, PARTS_ONLY, BOTH])
def test_a_message_without_content_is_empty(source: str) -> None:
    assert template(source).render([{"role": "assistant", "content": None}, {"role": "user"}]) == "[assistant][user]"


def test_the_meta_instruction_is_the_system_text_of_those_who_bring_none() -> None:
    with_meta = template(BOTH, meta_instruction="Be brief.")

    assert with_meta.render([{"role": "user", "content": "hi"}]) == "[system]Be brief.[user]hi"
    assert with_meta.render([{"role": "system", "content": "Be long."}, {"role": "user", "content": "hi"}]) == "[system]Be long.[user]hi"


def test_a_developer_is_a_system_where_the_template_knows_none() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hi"}]

    assert template(BOTH).render(messages) == "[system]Be brief.[user]hi"
    assert template(BOTH + "{# developer #}", meta_instruction="x").render(messages) == "[developer]Be brief.[user]hi"


def test_a_templates_complaint_reaches_the_user() -> None:
    with pytest.raises(TemplateError, match="messages: the model's chat template refuses them: the first message must be the user’s"):
        template(STRICT).render([{"role": "assistant", "content": "hi"}])


def test_a_broken_template_is_no_crash() -> None:
    with pytest.raises(TemplateError, match="chat template refuses"):
        template("{{ messages[0]['content'] + 1 }}").render([{"role": "user", "content": "hi"}])
    with pytest.raises(TemplateError, match="chat template refuses"):
        template("{% for %}").render([{"role": "user", "content": "hi"}])


def test_a_model_without_a_template_says_what_to_pass() -> None:
    with pytest.raises(
        TemplateError, match=r"no chat template; start the server with --chat-template FILE or NAME, or use /v1/completions"
    ):
        template(None).render([{"role": "user", "content": "hi"}])


def test_tools_have_a_template_of_their_own_where_there_is_one() -> None:
    named = template({"default": "plain", "tool_use": "{{ tools | length }} tools"})
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}

    assert named.render([{"role": "user", "content": "hi"}]) == "plain"
    assert named.render([{"role": "user", "content": "hi"}], tools=[tool]) == "1 tools"
    with pytest.raises(TemplateError, match="only rag"):
        template({"rag": "x"}).render([{"role": "user", "content": "hi"}])


def test_tool_calls_arguments_are_objects_to_the_template() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Hangzhou"}'}}

    assert template(CALLS).render([{"role": "assistant", "content": None, "tool_calls": [call]}]) == "Hangzhou"


def test_template_kwargs_reach_the_template() -> None:
    source = "{{ 'think' if enable_thinking else 'answer' }}"

    assert template(source).render([{"role": "user", "content": "hi"}], template_kwargs={"enable_thinking": True}) == "think"


def test_the_generation_prompt_can_be_left_out() -> None:
    rendered = [
        load_chat_template(tiny_folder("llama"), load_tokenizer(tiny_folder("llama"))).render(
            [{"role": "user", "content": "hi"}], add_generation_prompt=adds
        )
        for adds in (True, False)
    ]

    assert rendered[0] == rendered[1] + "<|im_start|>assistant\n"


def test_a_file_takes_the_place_of_the_models_template(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("mine: {{ messages[0]['content'] }}", encoding="utf-8")
    tokenizer = load_tokenizer(tiny_folder("llama"))

    rendered = load_chat_template(tiny_folder("llama"), tokenizer, chat_template=str(tmp_path / "mine.jinja"), process=JINJA).render(
        [{"role": "user", "content": "你好"}]
    )

    assert rendered == "mine: 你好"


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_an_older_processors_template_is_found(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps({"chat_template": "older"}))

    assert load_chat_template(tmp_path, load_tokenizer(tiny_folder("llama"))).render([{"role": "user", "content": "hi"}]) == "older"


def test_a_template_that_never_ends_is_stopped_when_it_is_loaded() -> None:
    forever = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    hasty = JinjaProcess(RenderLimits(cpu_s=0.2))

    with pytest.raises(
        TemplateError, match=r"messages: the model's chat template was stopped: it took longer than 0.2 s of processor time"
    ):
        ChatTemplate(load_tokenizer(tiny_folder("llama")), forever, process=hasty)


def test_a_template_that_never_ends_for_some_messages_costs_these_only() -> None:
    trap = "{% if messages | length > 1 %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}" + BOTH
    guarded = ChatTemplate(load_tokenizer(tiny_folder("llama")), trap, process=JinjaProcess(RenderLimits(cpu_s=0.2)))
    one = [{"role": "user", "content": "hi"}]

    with pytest.raises(TemplateError, match="was stopped"):
        guarded.render(one * 2)

    assert guarded.render(one) == "[user]hi"


@pytest.mark.parametrize("content", ["hi", PARTS])
@pytest.mark.parametrize("name", ["llama", "qwen2", "llava", "smolvlm", "qwen2_vl", "gemma3"])
def test_a_rendering_equals_the_reference_librarys_own(name: str, content: Any) -> None:
    tokenizer = load_tokenizer(tiny_folder(name))
    ours = load_chat_template(tiny_folder(name), tokenizer, process=JINJA)
    assert isinstance(ours, ChatTemplate)
    if not ours._takes_parts:
        content = "hi"
    messages = [
        {"role": "user", "content": content, "name": None},
        {"role": "assistant", "content": content},
        {"role": "user", "content": content},
    ]

    rendered = ours.render(messages)

    assert rendered == tokenizer.apply_chat_template(
        [ours._prepared(message, ours._choose(None)) for message in messages],
        chat_template=ours._choose(None),
        tokenize=False,
        add_generation_prompt=True,
    )
