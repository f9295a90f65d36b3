"""Measures of collapse in a round's responses."""

import itertools
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

_KEY_BITS = 63  # of an integer that holds a response's number and a trigram
_MAX_TOKEN_BITS = 20  # of a token in it
_RESPONSES_PER_SORT = 64


def response_statistics(shards: Iterable[pa.Table]) -> dict[str, float]:
    """Measure how varied the responses are.

    Args:
        shards: The `responses` stage: `prompt_id`, `response_tokens`. A prompt's responses are in one shard.

    Returns:
        `distinct_3`: the share of distinct trigrams of tokens in a response, mean over responses (1 for responses with
        fewer than three tokens). `identical_share`: the share of responses whose tokens equal those of another
        response to the same prompt.
    """
    shares: list[float] = []
    identical = 0
    for shard in shards:
        for part in shard.select(["prompt_id", "response_tokens"]).combine_chunks().to_batches():
            tokens = part["response_tokens"]
            offsets = tokens.offsets.to_numpy().astype(np.int64)
            values = tokens.values.to_numpy()[offsets[0] : offsets[-1]]
            offsets -= offsets[0]
            shares += _distinct_shares(values, offsets).tolist()
            bounds = itertools.pairwise(offsets)
            contents = (values[start:end].tobytes() for start, end in bounds)
            counts = Counter(zip(part["prompt_id"].to_pylist(), contents, strict=True))
            identical += sum(count for count in counts.values() if count > 1)
    return {"distinct_3": sum(shares) / len(shares), "identical_share": identical / len(shares)}


def _distinct_shares(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Share of distinct trigrams in each response, shape (responses,), float64.

    Args:
        values: Concatenated tokens of all responses, shape (tokens,).
        offsets: Start of each response, and the end of the last one, shape (responses + 1,).
    """
    if len(values) and int(values.max()).bit_length() > _MAX_TOKEN_BITS:
        values = np.unique(values, return_inverse=True)[1]  # only equality matters
    bits = int(values.max()).bit_length() if len(values) else 1
    size = min(2 ** (_KEY_BITS - 3 * bits), _RESPONSES_PER_SORT)
    parts = [offsets[start : start + size + 1] for start in range(0, len(offsets) - 1, size)]
    shares = [_distinct_shares_of_part(values[part[0] : part[-1]], part, bits) for part in parts]
    return np.concatenate(shares or [np.empty(0)])


def _distinct_shares_of_part(values: np.ndarray, offsets: np.ndarray, bits: int) -> np.ndarray:
    lengths = np.diff(offsets)
    response = np.repeat(np.arange(len(lengths)), lengths)
    keys = response[:-2]
    for position in range(3):
        keys = (keys << bits) | values[position : position + len(keys)]
    keys = np.sort(keys[response[:-2] == response[2:]])  # without trigrams that reach into the next response
    is_new = np.ones(len(keys), bool)
    is_new[1:] = keys[1:] != keys[:-1]
    trigrams = np.maximum(lengths - 2, 0)
    distinct = np.bincount(keys[is_new] >> (3 * bits), minlength=len(lengths))
    return np.where(trigrams > 0, distinct / np.maximum(trigrams, 1), 1.0)
