"""Thinking removed from what rewards see."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_pl.models.thinking import is_prefilled, text_without_thinking, tokens_without_thinking
from rlhf_pl.rewards import Sample
from rlhf_pl.rewards.remove_thinking import remove_thinking
from tests.conftest import make_tokenizer

MARKS = ("<think>", "</think>")
TOKENIZER = make_tokenizer()


@pytest.mark.parametrize(
    ("response", "opened", "expected"),
    [
        ("<think>Hm.</think>\n\nFour.", False, "Four."),
        ("Hm.</think>\n\nFour.", True, "Four."),
        ("Hm.</think>\n\nFour.", False, "Four."),
        ("<think>Hm.</think>Four.", True, "Four."),
        ("<think>Hm.", False, None),
        ("Hm.", True, None),
        ("<think>", True, None),
        ("Four.", False, "Four."),
        ("  Four.", False, "  Four."),
        ("Wait. <think>Hm.</think>Four.<think>a</think> Five.", False, "Wait. Four. Five."),
        ("Four.<think>Hm", False, None),
        ("<think></think>Four.", False, "Four."),
        ("<think>Hm, <think>Hm.</think> so.</think>Four.", False, "Four."),
        ("Hm, <think>Hm.</think> so.</think>Four.", True, "Four."),
        ("<think>Hm, <think> it is.</think>Four.", False, "Four."),
        ("", True, None),
        ("", False, ""),
    ],
)
def test_text_outside_thoughts_is_kept(response: str, opened: bool, expected: str | None) -> None:
    assert text_without_thinking(response, MARKS, opened) == expected
    ids = TOKENIZER(response, add_special_tokens=False)["input_ids"]
    kept = tokens_without_thinking(ids, TOKENIZER.decode, MARKS, opened)
    assert (None if kept is None else TOKENIZER.decode(kept).lstrip()) == (expected and expected.lstrip())


def test_tokens_that_span_two_marks() -> None:
    pieces = ["Wait.", "<", "think", "></", "think", ">\n", "\n", "Four", ".<", "think", ">", "Hm", "</", "think", ">!"]

    def decode(ids: Any) -> str:
        return "".join(pieces[i] for i in ids)

    assert text_without_thinking(decode(range(15)), MARKS) == "Wait.\n\nFour.!"
    assert tokens_without_thinking(list(range(15)), decode, MARKS) == [0, 6, 7]


def test_a_prompt_may_open_a_thought() -> None:
    assert is_prefilled("<|assistant|><think>\n", MARKS)
    assert not is_prefilled("<|assistant|><think>\n\n</think>\n\n", MARKS)
    assert not is_prefilled("Use <think> tags.<|assistant|>", MARKS)


def sample(text: str, **changes: Any) -> Sample:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return replace(Sample("p", [{"role": "user", "content": "?"}], text, ids), **changes)


def test_a_sample_without_its_thoughts() -> None:
    seen = remove_thinking(sample("Hm.</think>\n\nFour."), MARKS, "<|assistant|><think>\n", TOKENIZER)
    assert (seen.response, seen.finished) == ("Four.", True)
    assert TOKENIZER.decode(seen.response_tokens).strip() == "Four."
    truncated = remove_thinking(sample("Hm."), MARKS, "<|assistant|><think>\n", TOKENIZER)
    assert (truncated.response, list(truncated.response_tokens), truncated.finished) == ("", [], False)
    message = {"role": "assistant", "content": "Four.", "reasoning_content": "Hm.", "tool_calls": [{"a": 1}]}
    seen = remove_thinking(sample("Four.", message=message), MARKS)
    assert seen.message == {"role": "assistant", "content": "Four.", "tool_calls": [{"a": 1}]}


def test_marks_that_are_special_tokens() -> None:
    """The decoded text does not contain them, so a thought would look like part of the response."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    ids = tokenizer("<think>Hm.</think>\n\nFour.<|end|>", add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text == "Hm.\n\nFour."
    seen = remove_thinking(sample(text, response_tokens=ids), MARKS, "", tokenizer)
    assert (seen.response, tokenizer.decode(seen.response_tokens)) == ("Four.", "\n\nFour.<|end|>")


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.text("ab \n.", max_size=5)), max_size=4))
def test_tokens_and_text_agree(parts: list[tuple[bool, str]]) -> None:
    response = "".join(f"<think>{text}</think>" if thought else text for thought, text in parts)
    expected = "".join(text for thought, text in parts if not thought)
    ids = TOKENIZER(response, add_special_tokens=False)["input_ids"]
    kept = tokens_without_thinking(ids, TOKENIZER.decode, MARKS)
    assert kept is not None
    text = text_without_thinking(response, MARKS)
    assert text is not None
    assert text.lstrip() == expected.lstrip()
    assert "".join(TOKENIZER.decode(kept).split()) == "".join(expected.split())
