import pytest

from rlhf_pl.models.chat import encode_prompt, find_prompt_problem, with_system_prompt
from rlhf_pl.models.source import ModelSource

USER = {"role": "user", "content": "Hi"}


def test_bos_is_written_once(source: ModelSource) -> None:
    """The tokenizer adds a BOS to plain text, and the template writes one too."""
    ids = encode_prompt(source.tokenizer, [USER])
    assert source.tokenizer("Hi")["input_ids"][0] == source.tokenizer.bos_token_id
    assert ids.count(source.tokenizer.bos_token_id) == 1
    assert source.tokenizer.decode(ids) == "<s><|user|>Hi<|end|><|assistant|>"


def test_system_prompt_does_not_replace_that_of_a_row() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert with_system_prompt([USER], "Be kind.") == [{"role": "system", "content": "Be kind."}, USER]
    assert with_system_prompt([system, USER], "Be kind.") == [system, USER]
    assert with_system_prompt([USER], None) == [USER]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (7, "expected text or a list"),
        ([], "empty"),
        (["Hi"], "message 0 is str"),
        ([{"role": "user"}], "nothing under `content`"),
        ([{"role": "user", "content": None}], "NoneType under `content`"),
        ([{"role": "user", "content": " "}], "is empty"),
        ([USER, {"role": "assistant", "content": "Hello"}], "last message is the assistant"),
    ],
)
def test_problems_are_named(messages: object, problem: str) -> None:
    assert problem in str(find_prompt_problem(messages))


def test_a_valid_prompt_has_no_problem() -> None:
    assert find_prompt_problem([USER, {"role": "assistant", "content": "Hello"}, USER]) is None
