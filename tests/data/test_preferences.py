"""Comparisons in the forms of published data sets."""

from collections.abc import Callable
from typing import Any

import pytest

from rlhf_pl.data.preferences import load_preferences
from rlhf_pl.utils.errors import InputError

Write = Callable[..., str]
ASK = {"role": "user", "content": "Why?"}


def response(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


FORMS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
    "messages": {"prompt": [ASK], "chosen": [response("Because.")], "rejected": [response("No.")]},
    "one message": {"prompt": "Why?", "chosen": response("Because."), "rejected": response("No.")},
    "conversations": {"chosen": [ASK, response("Because.")], "rejected": [ASK, response("No.")]},
    "conversations with a prompt column": {
        "prompt": "Why?",
        "chosen": [ASK, response("Because.")],
        "rejected": [ASK, response("No.")],
    },
    "human and assistant": {
        "chosen": "\n\nHuman: Why?\n\nAssistant: Because.",
        "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
    },
    "common beginning": {"chosen": "Why? Because.", "rejected": "Why? No."},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pair(write_jsonl: Write, form: str) -> None:
    (pair,) = load_preferences(write_jsonl([FORMS[form]])).pairs
    assert (pair.messages, pair.chosen, pair.rejected, pair.label) == ([ASK], "Because.", "No.", 1.0)


def test_turns_before_the_last_response_are_the_prompt(write_jsonl: Write) -> None:
    """As in HH-RLHF; inside a line, `Human:` does not begin a turn."""
    shared = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: What does\nHuman: mean?"
    row = {"chosen": shared + "\n\nAssistant: A person:\n\nyou.", "rejected": shared + "\n\nAssistant: Nothing"}
    (pair,) = load_preferences(write_jsonl([row])).pairs
    assert [m["role"] for m in pair.messages] == ["user", "assistant", "user"]
    assert pair.messages[-1]["content"] == "What does\nHuman: mean?"
    assert (pair.chosen, pair.rejected) == ("A person:\n\nyou.", "Nothing")


def test_columns_are_mapped_and_a_system_prompt_is_added(write_jsonl: Write) -> None:
    file = write_jsonl([{"q": "Why?", "good": "Because.", "bad": "No."}])
    names = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    (pair,) = load_preferences(file, names, "Be kind.").pairs
    assert pair.messages[0] == {"role": "system", "content": "Be kind."}


def test_ties_are_dropped_or_kept_and_low_labels_swap_the_responses(write_jsonl: Write) -> None:
    rows = [FORMS["texts"] | {"label": label} for label in (1, "tie", 0.5, 0, 0.8)]
    file = write_jsonl(rows)
    found = load_preferences(file)
    assert found.dropped["tie"] == 2
    assert [(p.chosen, p.label) for p in found.pairs] == [("Because.", 1), ("No.", 1), ("Because.", 0.8)]
    assert [p.label for p in load_preferences(file, ties="half").pairs] == [1, 0.5, 0.5, 1, 0.8]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (FORMS["texts"] | {"rejected": "Because."}, "are the same response. `data.on_wrong_pairs: drop`"),
        (FORMS["texts"] | {"rejected": " "}, "the response in `rejected` is empty"),
        (FORMS["human and assistant"] | {"rejected": "\n\nHuman: Why?\n\nAssistant:"}, "`rejected` is empty"),
        ({"prompt": "Why?", "chosen": "Because."}, "no column `rejected`; found prompt, chosen"),
        ({"chosen": "Because.", "rejected": "No."}, "have no common beginning"),
        (FORMS["texts"] | {"chosen": ["Because."]}, "`chosen`: message 0 is str, expected an object"),
        (FORMS["texts"] | {"chosen": 3}, "`chosen` is int; expected text or a list"),
        (FORMS["texts"] | {"label": 2}, "`label` is 2; expected 1"),
        (FORMS["texts"] | {"margin": "much"}, "`margin` is 'much'; expected a number"),
        (FORMS["texts"] | {"prompt": ""}, "is empty"),
        (
            {"chosen": [ASK, response("a"), ASK, response("b")], "rejected": [ASK, response("c")]},
            "differ from message 1 on",
        ),
        ({"chosen": [ASK], "rejected": [ASK, response("c")]}, "does not end with an assistant message"),
    ],
)
def test_invalid_rows_are_named(write_jsonl: Write, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        load_preferences(write_jsonl([FORMS["texts"], row]))
    assert "line 2: " in str(error.value)
    assert message in str(error.value)


def test_wrong_pairs_can_be_dropped(write_jsonl: Write) -> None:
    rows = [FORMS["texts"], FORMS["texts"] | {"rejected": "Because."}, FORMS["texts"] | {"chosen": ""}]
    found = load_preferences(write_jsonl(rows), on_wrong_pairs="drop")
    assert (len(found.pairs), found.dropped["equal_or_empty"]) == (1, 2)
    with pytest.raises(InputError, match=r"no row of .* is left"):
        load_preferences(write_jsonl(rows[1:]), on_wrong_pairs="drop")
