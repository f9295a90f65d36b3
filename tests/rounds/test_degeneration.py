"""Statistics of a round's responses equal plain counting in Python, to the last bit."""

import random
from collections import Counter

import pyarrow as pa
import pytest

from rlhf_pl.rounds.degeneration import response_statistics

SCHEMA = pa.schema([("prompt_id", pa.string()), ("response_tokens", pa.list_(pa.int32()))])


def table_of(rows: list[tuple[str, list[int]]]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], schema=SCHEMA)


def count_plainly(rows: list[tuple[str, list[int]]]) -> dict[str, float]:
    shares = []
    for _, tokens in rows:
        trigrams = [tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)]
        shares.append(len(set(trigrams)) / len(trigrams) if trigrams else 1.0)
    counts = Counter((prompt_id, tuple(tokens)) for prompt_id, tokens in rows)
    identical = sum(count for count in counts.values() if count > 1)
    return {"distinct_3": sum(shares) / len(shares), "identical_share": identical / len(rows)}


def test_statistics_worked_by_hand() -> None:
    """1 1 1 1 has two trigrams, one of them distinct; 1 2 has none and counts as 1; two of four are equal."""
    rows = [("a", [1, 1, 1, 1]), ("a", [1, 2]), ("a", [1, 2]), ("b", [1, 2])]
    assert response_statistics([table_of(rows)]) == {"distinct_3": (0.5 + 1 + 1 + 1) / 4, "identical_share": 0.5}


@pytest.mark.parametrize("vocabulary", [2, 300, 200_000, 2**31 - 1])
def test_statistics_equal_plain_counting(vocabulary: int) -> None:
    rng = random.Random(vocabulary)
    rows = [
        (str(i // 5), [rng.randrange(vocabulary) for _ in range(rng.choice([0, 1, 2, 3, 4, 40]))]) for i in range(500)
    ]
    rows[7] = ("1", [vocabulary - 1] * 9)
    assert response_statistics([table_of(rows)]) == count_plainly(rows)
    assert response_statistics([table_of(rows[:100]), table_of(rows[100:])]) == count_plainly(rows)
    assert response_statistics([table_of(rows).slice(5, 200)]) == count_plainly(rows[5:205])
