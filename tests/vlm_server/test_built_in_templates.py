"""Every built-in template, as the models' makers write a conversation: whole texts, and equality with Jinja templates."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.image_fixtures import tiny_folder
from vlm_server.built_in_templates import BUILT_IN, NOT_BUILT_IN
from vlm_server.role_template import RoleChatTemplate
from vlm_server.template_choice import load_chat_template
from vlm_server.tokenizer import load_tokenizer

TALK = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2")]
ENGLISH = "You are a helpful assistant."
END = "<｜end▁of▁sentence｜>"

# name → (the default opening, the opening with the system text "§", the talk after it)
CHATML = "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
CHATML_S = "<|im_start|>system\n§<|im_end|>\n"
VICUNA = "USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"
LLAMA2 = "Q1 [/INST] A1 </s><s>[INST] Q2 [/INST]"
LLAMA2_S = "[INST] <<SYS>>\n§\n<</SYS>>\n\n"
LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n{}"
MISTRAL = "[INST] Q1 [/INST]A1</s>[INST] Q2 [/INST]"
GOLDEN = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
        "§\n\n",
        "### Instruction:\nQ1\n\n### Response: A1\n\n### Instruction:\nQ2\n\n### Response: ",
    ),
    "base": ("", "§", "Q1A1Q2"),
    "chatml": ("", CHATML_S, CHATML),
    "codellama": ("[INST] <<SYS>>\n\n<</SYS>>\n\n", LLAMA2_S, LLAMA2),
    "cogvlm": ("", "§", "Question: Q1 Answer:A1</s>\nQuestion: Q2 Answer:"),
    "deepseek-vl": (
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, and assist "
        "the user with a variety of tasks using natural language.\n\n",
        "§\n\n",
        f"User: Q1\n\nAssistant: A1{END}User: Q2\n\nAssistant:",
    ),
    "deepseek-vl2": ("", "§", f"<|User|>: Q1\n\n<|Assistant|>: A1{END}<|User|>: Q2\n\n<|Assistant|>:"),
    "gemma": (
        "",
        "§",
        "<start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\n",
    ),
    "internlm": (..., "<|System|>:§\n", "<|User|>:Q1\n<|Bot|>:A1<eoa>\n<|User|>:Q2\n<|Bot|>:"),
    "internlm2": (..., CHATML_S, CHATML),
    "internvl-zh": ("", "§", "<human>: Q1 <bot>: A1</s><human>: Q2 <bot>:"),
    "llama2": (..., LLAMA2_S, LLAMA2),
    "llama3": (
        "",
        LLAMA3.format("system", "§<|eot_id|>"),
        LLAMA3.format("user", "Q1<|eot_id|>")
        + LLAMA3.format("assistant", "A1<|eot_id|>")
        + LLAMA3.format("user", "Q2<|eot_id|>")
        + LLAMA3.format("assistant", ""),
    ),
    "llava-chatml": (
        "<|im_start|>system\nAnswer the questions.<|im_end|>",
        "<|im_start|>system\n§<|im_end|>",
        CHATML.replace("<|im_end|>\n", "<|im_end|>"),
    ),
    "llava-v1": (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions. ",
        "§ ",
        VICUNA,
    ),
    "mistral": ("", "§", MISTRAL),
    "mixtral": ("", "§", MISTRAL),
    "phi-3": (
        "",
        "<|system|>\n§<|end|>\n",
        "<|user|>\nQ1<|end|>\n<|assistant|>\nA1<|end|>\n<|user|>\nQ2<|end|>\n<|assistant|>\n",
    ),
    "qwen": (f"<|im_start|>system\n{ENGLISH}<|im_end|>\n", CHATML_S, CHATML),
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
        "§ ",
        VICUNA,
    ),
}
STOPS = {
    "chatml": ["<|im_end|>"],
    "cogvlm": ["</s>"],
    "gemma": ["<end_of_turn>"],
    "internlm": ["<eoa>"],
    "internlm2": ["<|im_end|>", "<|action_end|>"],
    "llama3": ["<|eot_id|>", "<|end_of_text|>"],
    "llava-chatml": ["<|im_end|>"],
    "llava-v1": ["</s>"],
    "phi-3": ["<|end|>", "<|endoftext|>", "<|assistant|>"],
    "qwen": ["<|im_end|>"],
    "vicuna": ["</s>"],
}


def messages(turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in turns]


def render(name: str, turns: list[tuple[str, str]], **options: Any) -> str:
    return RoleChatTemplate(BUILT_IN[name]).render(messages(turns), **options)


def test_every_built_in_template_has_a_golden_text() -> None:
    assert sorted(GOLDEN) == sorted(BUILT_IN)
    assert not set(BUILT_IN) & set(NOT_BUILT_IN)


@pytest.mark.parametrize("name", GOLDEN)
def test_several_turns_are_written_as_the_models_were_trained(name: str) -> None:
    default, with_system, talk = GOLDEN[name]

    assert render(name, [("system", "§"), *TALK]) == f"{with_system}{talk}"
    if default is ...:  # a long text of the makers between the words
        before, _, after = with_system.partition("§")
        assert render(name, TALK).startswith(f"{before}You are ")
        assert render(name, TALK).endswith(f"{after}{talk}")
    else:
        assert render(name, TALK) == f"{default}{talk}"


@pytest.mark.parametrize("name", GOLDEN)
def test_stop_words_are_those_that_end_a_turn(name: str) -> None:
    assert list(BUILT_IN[name].stop_words) == STOPS.get(name, [])


@pytest.mark.parametrize("name", GOLDEN)
def test_a_last_turn_of_the_assistant_is_continued(name: str) -> None:
    words = BUILT_IN[name]
    begun = render(name, [*TALK, ("assistant", "Once upon")])

    assert begun.endswith(f"{words.assistant}Once upon")
    assert render(name, [*TALK, ("assistant", "Once upon")], add_generation_prompt=False) == begun + words.eoa + words.separator


# The same conversations in Jinja, written for this test.
CHATML_JINJA = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}{{ opening }}{% endif %}"
JINJA = {
    "chatml": CHATML_JINJA,
    "qwen": DEFAULT_SYSTEM + CHATML_JINJA,
    "internlm2": DEFAULT_SYSTEM + CHATML_JINJA,
    "llama3": (
        "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "vicuna": (
        DEFAULT_SYSTEM + "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}{% elif m.role == 'user' %}"
        "{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + '</s>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "phi-3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "llama2": (
        "{% set system = messages[0].content if messages[0].role == 'system' else default %}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{{ '' if loop.first else '<s>' }}[INST] "
        "{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first else '' }}{{ m.content }} [/INST]"
        "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
    ),
}
NO_SYSTEM_JINJA = {
    "gemma": (
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content }}"
        "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
    ),
}

# Jinja drops one line break at a template's own end; text of the messages is never touched.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def talks(draw: st.DrawFn, *, with_system: bool) -> list[tuple[str, str]]:
    turns = [("system", draw(texts))] if with_system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 3))):
        turns += [("user", draw(texts)), ("assistant", draw(texts))]
    return [*turns, ("user", draw(texts))]


@pytest.mark.parametrize("name", [*JINJA, *NO_SYSTEM_JINJA])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_built_in_template_equals_its_jinja_template_rendered_by_the_reference(name: str, data: st.DataObject) -> None:
    turns = data.draw(talks(with_system=name in JINJA))
    words = BUILT_IN[name]
    opening = words.system + (words.meta_instruction or "") + words.eosys

    expected = load_tokenizer_once().apply_chat_template(
        messages(turns),
        chat_template=JINJA.get(name) or NO_SYSTEM_JINJA[name],
        tokenize=False,
        add_generation_prompt=True,
        opening=opening,
        default=words.meta_instruction,
    )

    assert render(name, turns) == expected


TOKENIZERS: list[Any] = []


def load_tokenizer_once() -> Any:
    if not TOKENIZERS:
        TOKENIZERS.append(load_tokenizer(tiny_folder("llama")))
    return TOKENIZERS[0]


@pytest.mark.parametrize("name", NOT_BUILT_IN)
def test_a_name_whose_prompts_words_cannot_write_is_refused_with_the_names_that_are_there(name: str) -> None:
    with pytest.raises(ValueError, match=f"chat_template: {name} is not built in: .*; built in are alpaca, base, .*vicuna, and hf"):
        load_chat_template(tiny_folder("llama"), load_tokenizer_once(), chat_template=name)


def test_an_unknown_name_is_refused_with_the_names_that_are_there() -> None:
    with pytest.raises(ValueError, match=r"chat_template: /no/such is neither a file nor built in; built in are alpaca, base, .*, and hf"):
        load_chat_template(tiny_folder("llama"), load_tokenizer_once(), chat_template="/no/such")
