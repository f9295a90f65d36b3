"""Measures of collapse in a round's answers."""

import itertools
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

_BITS = 63  # of a run of three tokens with the number of its response, as one integer
_MOST_BITS = 20  # of a token in it
_TOGETHER = 64  # responses whose runs are sorted in one go


def answer_statistics(shards: Iterable[pa.Table]) -> dict[str, float]:
    """How varied answers are.

    Args:
        shards: The `responses` stage: `prompt_id`, `response_tokens`. A prompt's responses are in one shard.

    Returns:
        `distinct_3`: the share of runs of three tokens within an answer that are distinct, mean over answers (1 for
        answers of fewer tokens). `identical_share`: the share of answers whose tokens equal those of another answer
        to their prompt.
    """
    shares: list[float] = []
    identical = 0
    for shard in shards:
        for part in shard.select(["prompt_id", "response_tokens"]).combine_chunks().to_batches():
            tokens = part["response_tokens"]
            ends = tokens.offsets.to_numpy().astype(np.int64)
            values = tokens.values.to_numpy()[ends[0] : ends[-1]]
            ends -= ends[0]
            shares += _distinct_shares(values, ends).tolist()
            bounds = itertools.pairwise(ends)
            contents = (values[start:end].tobytes() for start, end in bounds)
            counts = Counter(zip(part["prompt_id"].to_pylist(), contents, strict=True))
            identical += sum(count for count in counts.values() if count > 1)
    return {"distinct_3": sum(shares) / len(shares), "identical_share": identical / len(shares)}


def _distinct_shares(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Of each response the share of its runs of three tokens that are distinct, shape (responses,), float64.

    Args:
        values: Tokens of all responses, one after the other, shape (tokens,).
        ends: Where each begins, and the last one's end, shape (responses + 1,).
    """
    if len(values) and int(values.max()).bit_length() > _MOST_BITS:
        values = np.unique(values, return_inverse=True)[1]  # what counts is which are equal
    bits = int(values.max()).bit_length() if len(values) else 1
    size = min(2 ** (_BITS - 3 * bits), _TOGETHER)
    parts = [ends[start : start + size + 1] for start in range(0, len(ends) - 1, size)]
    return np.concatenate([_shares_of_part(values[part[0] : part[-1]], part, bits) for part in parts] or [np.empty(0)])


def _shares_of_part(values: np.ndarray, ends: np.ndarray, bits: int) -> np.ndarray:
    lengths = np.diff(ends)
    number = np.repeat(np.arange(len(lengths)), lengths)
    keys = number[:-2]
    for place in range(3):
        keys = (keys << bits) | values[place : place + len(keys)]
    keys = np.sort(keys[number[:-2] == number[2:]])  # without runs that end in the next response
    is_new = np.ones(len(keys), bool)
    is_new[1:] = keys[1:] != keys[:-1]
    runs = np.maximum(lengths - 2, 0)
    distinct = np.bincount(keys[is_new] >> (3 * bits), minlength=len(lengths))
    return np.where(runs > 0, distinct / np.maximum(runs, 1), 1.0)
