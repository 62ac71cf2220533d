"""Chinese-LLaMA-Alpaca's prompts byte by byte, and the text that is returned of an answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_server.alpaca import StrippedStream, Turn, answer_text, chat_prompt, completion_prompt


def test_an_instruction_stands_in_the_template_behind_a_blank_line_of_four_spaces() -> None:
    assert completion_prompt("Tell me where the capital of China is") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "    \n"
        "### Instruction:\n"
        "Tell me where the capital of China is\n"
        "\n"
        "### Response: "
    )


def test_a_conversation_is_written_turn_by_turn() -> None:
    turns = [Turn("user", "Tell me some stories about Hangzhou"), Turn("assistant", "Gladly."), Turn("user", "杭州")]

    assert chat_prompt(turns) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Tell me some stories about Hangzhou\n"
        "\n"
        "### Response: Gladly.\n"
        "\n"
        "### Instruction:\n"
        "杭州\n"
        "\n"
        "### Response: "
    )


def test_the_last_system_text_takes_the_first_sentences_place_wherever_it_stands() -> None:
    turns = [Turn("system", "Be brief."), Turn("user", "Hi"), Turn("system", "Be kind.")]

    assert chat_prompt(turns) == "Be kind.\n\n### Instruction:\nHi\n\n### Response: "


def test_an_empty_system_text_is_one() -> None:
    assert chat_prompt([Turn("system", ""), Turn("user", "Hi")]) == "\n\n### Instruction:\nHi\n\n### Response: "


def test_another_first_sentence_stands_where_the_conversation_brings_none() -> None:
    assert chat_prompt([Turn("user", "Hi")], task="Sing.") == "Sing.\n\n### Instruction:\nHi\n\n### Response: "
    assert chat_prompt([Turn("system", "Hum."), Turn("user", "Hi")], task="Sing.").startswith("Hum.\n\n")


@pytest.mark.parametrize("role", ["developer", "tool", "User", ""])
def test_roles_that_the_template_has_no_words_for_are_not_in_the_prompt(role: str) -> None:
    assert chat_prompt([Turn("user", "Hi"), Turn(role, "left out")]) == chat_prompt([Turn("user", "Hi")])
    assert not Turn(role, "").is_known


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (" Beijing.\n", "Beijing."),
        ("", ""),
        ("One.\n\n### Instruction:\nMore\n\n### Response: Two. ", "Two."),
        ("One. ### Response", "One. ### Response"),
    ],
)
def test_an_answer_is_the_text_behind_its_last_response_stripped(written: str, text: str) -> None:
    assert answer_text(written) == text


@given(st.lists(st.text(st.sampled_from(" \n\ta好"), max_size=4)))
def test_pieces_are_stripped_as_their_whole_is(pieces: list[str]) -> None:
    stream = StrippedStream()

    assert "".join(map(stream.feed, pieces)) == "".join(pieces).strip()
