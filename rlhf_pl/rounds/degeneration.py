"""Measures of collapse in a round's answers."""

from collections import Counter

import pyarrow as pa


def answer_statistics(responses: pa.Table) -> dict[str, float]:
    """How varied answers are.

    Args:
        responses: The `responses` stage: `prompt_id`, `response_tokens`.

    Returns:
        `distinct_3`: the share of runs of three tokens within an answer that are distinct, mean over answers (1 for
        answers of fewer tokens). `identical_share`: the share of answers whose tokens equal those of another answer
        to their prompt.
    """
    ids = responses["prompt_id"].to_pylist()
    answers = [tuple(tokens) for tokens in responses["response_tokens"].to_pylist()]
    shares = []
    for tokens in answers:
        runs = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
        shares.append(len(set(runs)) / len(runs) if runs else 1.0)
    counts = Counter(zip(ids, answers, strict=True))
    identical = sum(count for count in counts.values() if count > 1)
    return {"distinct_3": sum(shares) / len(shares), "identical_share": identical / len(answers)}
