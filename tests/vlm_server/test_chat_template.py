import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.image_fixtures import tiny_folder
from tests.tiny_models import make_tokenizer
from vlm_server.answer_formats import AnswerFormats
from vlm_server.chat_template import ChatTemplate, TemplateError
from vlm_server.jinja_process import JinjaProcess
from vlm_server.jinja_worker import RenderLimits
from vlm_server.parsing.tool_formats import TOOL_FORMATS
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


@pytest.mark.parametrize(("source", "shows"), [("{{ tools | tojson }}", True), (BOTH, False), (None, False), ("{{ tools[1] }}", False)])
def test_a_template_that_leaves_tools_out_is_told_apart(source: str | None, shows: bool) -> None:
    assert template(source).shows_tools == shows


USERS_ONLY = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
CALLS_ONLY = "{% for m in messages %}{{ m.tool_calls }}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "field"),
    [(USERS_ONLY, "messages[1].tool_calls"), (BOTH, "messages[1].tool_calls"), (CALLS_ONLY, "messages[2].tool_call_id")],
)
def test_calls_and_results_that_a_template_would_drop_are_refused(source: str, field: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {}}}
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "Blue."},
    ]

    with pytest.raises(TemplateError, match=re.escape(f"{field}: the model's chat template writes none; start with --chat-template FILE")):
        template(source).render(turns)
    assert template(source).render([{"role": "user", "content": "hi"}])


def test_the_template_for_tools_is_looked_at_where_there_is_one() -> None:
    named = template({"default": "plain", "tool_use": "{{ tools }}<tool_call>"})

    assert named.shows_tools
    assert "<tool_call>" in named.text


def test_results_of_functions_are_strings_to_templates_that_take_both() -> None:
    result = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "Sunny"}, {"type": "text", "text": "27 C"}]}
    picture = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "Here"}, {"type": "image"}]}

    assert template(BOTH).render([result]) == "[tool]Sunny\n27 C"
    assert template(BOTH).render([picture]) == "[tool]Here<image>"
    assert template(PARTS_ONLY).render([result]) == "[tool]Sunny27 C"


MISTRAL_IDS = (
    "{# [TOOL_CALLS] #}{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.id }}={{ c.function.name }} {% endfor %}"
    "{% if m.role == 'tool' %}{{ m.tool_call_id }}={{ m.content }} {% endif %}{% endfor %}"
)


def test_ids_of_calls_are_what_mistrals_templates_take() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [
        {"role": "assistant", "tool_calls": [{"id": "call_" + "a" * 24, **call}, {"id": "D681PevKs", **call}]},
        {"role": "tool", "tool_call_id": "call_" + "a" * 24, "content": "x"},
        {"role": "tool", "tool_call_id": "D681PevKs", "content": "y"},
    ]

    first, second, first_again, second_again = (item.split("=")[0] for item in template(MISTRAL_IDS).render(messages).split())

    assert (first, second) == (first_again, second_again)
    assert (len(first), second) == (9, "D681PevKs")
    assert first.isalnum()


CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


INTERNLM = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def internlm(source: str | None = INTERNLM) -> ChatTemplate:
    special = ("<s>", "<|im_start|>", "<|im_end|>", "<|action_start|>", "<|action_end|>", "<|plugin|>")
    return ChatTemplate(make_tokenizer(special, bos_token="<s>"), source)


def test_internlm_is_told_of_tools_calls_and_results_in_messages() -> None:
    tool = {"type": "function", "function": {"name": "look", "description": "看", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "天"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Look!"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "Blue."}]},
    ]

    assert internlm().shows_tools
    assert internlm().render(messages, tools=[tool]) == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n"
        '<|im_start|>system name=<|plugin|>\n[{"name": "look", "description": "看", "parameters": {"type": "object"}}]<|im_end|>\n'
        "<|im_start|>user\nLook!<|im_end|>\n"
        '<|im_start|>assistant\n<|action_start|><|plugin|>\n{"name": "look", "parameters": {"at": "天"}}<|action_end|><|im_end|>\n'
        "<|im_start|>environment name=<|plugin|>\nBlue.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert internlm().render(messages[:2]).count("<|im_start|>") == 3


def test_internlms_calls_follow_parts_too() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {}}}
    source = "{% for m in messages %}{{ m.content if m.content is string else m.content | map(attribute='text') | join }}{% endfor %}"

    rendered = internlm(source).render([{"role": "assistant", "content": [{"type": "text", "text": "So: "}], "tool_calls": [call]}])

    assert rendered == 'So: <|action_start|><|plugin|>\n{"name": "look", "parameters": {}}<|action_end|>'


def test_internlms_format_is_seen_although_its_template_does_not_show_it() -> None:
    formats = AnswerFormats.choose("auto", "auto", template=internlm().text, shows_tools=internlm().shows_tools)

    assert formats.tools is TOOL_FORMATS["internlm"]
    assert internlm(None).text == ""
    assert not internlm(None).shows_tools


def test_the_last_message_is_continued() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Once upon"}]

    rendered = template(CHATML).render(messages, add_generation_prompt=False, continue_final_message=True)

    assert rendered == "<user>hi</><assistant>Once upon"


def test_a_last_message_that_the_template_changes_is_not_continued() -> None:
    changing = "{% for m in messages %}{{ m.content | length }}{% endfor %}"

    with pytest.raises(TemplateError, match=r"continue_final_message: the model's chat template changes the last message's text$"):
        template(changing).render([{"role": "assistant", "content": "Once"}], add_generation_prompt=False, continue_final_message=True)


@pytest.mark.parametrize(
    "source", ["{{ 1 // 0 }}", "{{ range(10 ** 9) | list }}", "{{ messages[0].content.nothing.at.all }}", "{{ [][0:1:0] }}"]
)
def test_whatever_a_template_stumbles_over_is_the_requests_mistake(source: str) -> None:
    with pytest.raises(TemplateError, match="chat template refuses"):
        template(source).render([{"role": "user", "content": "hi"}])


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
