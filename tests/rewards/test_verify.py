"""Verifiable rewards, with values computed by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_pl.rewards import ExactAnswer, JSONSchema, LengthWindow, NumericAnswer, RegexMatch, Sample
from rlhf_pl.rewards.verify import RuleReward, find_final_number
from rlhf_pl.utils.errors import InputError


def score(reward: RuleReward, response: str, **columns: Any) -> float:
    sample = Sample("p", [{"role": "user", "content": "?"}], response, columns=columns)
    return reward.score([sample])[0].reward


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("17 + 26 = 43", 43),
        ("The answer is 42. I counted 3 times.", 42),
        ("so \\boxed{1,234.5} and not 7", 1234.5),
        ("#### -3", -3),
        ("It costs $1,250.", 1250),
        ("3/4", 0.75),
        ("about 1e3 or so", 1000),
        ("covid-19", 19),
        (".5", 0.5),
        ("That is 20%.", 20),
        ("no number at all", None),
        ("", None),
        ("1/0", None),
    ],
)
def test_final_number(text: str, number: float | None) -> None:
    assert find_final_number(text) == number


def test_numeric_answer_accepts_keys_as_numbers_or_text() -> None:
    assert score(NumericAnswer(), "It is 43.", answer=43) == 1
    assert score(NumericAnswer(), "It is 43.", answer="17 + 26 = 43\n#### 43") == 1
    assert score(NumericAnswer(), "It is 42.", answer="43") == 0
    assert score(NumericAnswer(tolerance=0.01), "1005", answer=1000) == 1
    assert score(NumericAnswer("key"), "none", key=0) == 0
    with pytest.raises(InputError, match=r"`answer`, which prompt_id 'p' does not have. Columns: key"):
        score(NumericAnswer(), "1", key=1)
    with pytest.raises(InputError, match="which contains no number"):
        score(NumericAnswer(), "1", answer="one")


def test_exact_answer() -> None:
    assert score(ExactAnswer(), "  Paris\n", answer="paris") == 1
    assert score(ExactAnswer(ignore_case=False), "Paris", answer="paris") == 0
    assert score(ExactAnswer(), "Lyon", answer=["Paris", "Lyon"]) == 1
    assert score(ExactAnswer(pattern=r"Answer: (\w+)"), "Answer: B\nno, Answer: C", answer="c") == 1
    assert score(ExactAnswer(pattern=r"Answer: (\w+)"), "B", answer="B") == 0
    with pytest.raises(InputError, match="is not a regular expression"):
        ExactAnswer(pattern="(")


def test_regular_expressions() -> None:
    assert score(RegexMatch(r"^\d{3}$"), "123") == 1
    assert score(RegexMatch(r"^\d{3}$"), "1234") == 0
    assert score(RegexMatch(column="wanted", ignore_case=True), "YES", wanted="^yes") == 1
    with pytest.raises(InputError, match="either `pattern` or `column`"):
        RegexMatch()


def test_json_schema(tmp_path: Path) -> None:
    schema = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    for reward in (JSONSchema(schema), JSONSchema(str(tmp_path / "schema.json"))):
        assert score(reward, '{"name": "Ann"}') == 1
        assert score(reward, '```json\n{"name": "Ann"}\n```') == 1
        assert score(reward, '{"name": 3}') == 0
        assert score(reward, "name: Ann") == 0
    assert score(JSONSchema(column="schema"), "[]", schema='{"type": "array"}') == 1
    with pytest.raises(InputError, match="is not a JSON Schema"):
        JSONSchema({"type": "thing"})


def test_length_window_falls_off_linearly() -> None:
    reward = LengthWindow(2, 4, "words", falloff=4)
    assert [score(reward, "w " * n) for n in (0, 2, 4, 6, 8, 20)] == [0.5, 1, 1, 0.5, 0, 0]
    assert score(LengthWindow(0, 3, "characters"), "four") == 0
    with pytest.raises(InputError, match="shortest <= longest"):
        LengthWindow(5, 4)
