"""Selects what a round trains on: pairs of scored responses, or whole groups."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rlhf_pl.algorithms.pair_selection import PairSelector
from rlhf_pl.algorithms.reward_shaping import RewardShaping, break_ties, shape_rewards
from rlhf_pl.data.stored_groups import GROUPS, PAIRS
from rlhf_pl.rounds.stages.generate import prompt_seed
from rlhf_pl.store.round_store import Round

_COLUMNS = ("prompt_id", "response_index", "finished", "response_tokens")


@dataclass
class _Group:
    """The scored responses to a prompt. Responses with equal tokens have equal `digests`."""

    prompt_id: str
    indices: list[int]
    rewards: list[float]
    lengths: list[int]
    finished: list[bool]
    digests: list[bytes]


def select(
    stored: Round,
    selector: PairSelector | None,
    run_seed: int,
    limit: int | None = None,
    shaping: RewardShaping = RewardShaping(),  # noqa: B008 - frozen
    keep_ties: bool = False,
) -> None:
    """Select pairs or groups to train on, and count the prompts without any, by reason.

    Args:
        stored: The round. Its responses and rewards are read and its stage `pairs` is written: indices into each
            prompt's responses, and shaped rewards.
        selector: Selects pairs; None for whole groups, of the prompts with at least two scored responses.
        run_seed: The run's seed.
        limit: Maximum number of pairs or groups.
        shaping: Penalties and normalisation, applied to the scores first.
        keep_ties: Keep pairs with equal rewards, because a KL term will break the tie. The selector sees such rewards
            in a random order.
    """
    groups = _scored_groups(stored)
    rewards, lengths, finished = (
        [getattr(group, name) for group in groups] for name in ("rewards", "lengths", "finished")
    )
    shaped, penalties = shape_rewards(rewards, lengths, finished, shaping)
    for group, group_rewards in zip(groups, shaped, strict=True):
        group.rewards = group_rewards
    usable = [group for group in groups if len(group.indices) > 1]
    dropped = {"no_reward_difference": 0, "same_answer": 0, "not_scored": len(groups) - len(usable)}
    if selector is None:
        usable = usable[:limit]
        table = _groups_table(usable)
        counts = {"pairs": len(usable), "groups": len(usable), "responses": len(table)}
    else:
        table = _pairs_table(usable, selector, run_seed, keep_ties, dropped).slice(0, limit)
        counts = {"pairs": len(table)}
        if keep_ties:
            counts["kept_ties"] = pc.sum(pc.equal(table["chosen_reward"], table["rejected_reward"])).as_py() or 0
    stored.write_shard("pairs", 0, table)
    stored.complete(
        "pairs",
        prompts=len(groups),
        **counts,
        dropped=dropped,
        selector=None if selector is None else type(selector).__name__,
        penalties=penalties,
    )


def _groups_table(groups: Sequence[_Group]) -> pa.Table:
    """Table with a row for each response."""
    ids = [group.prompt_id for group in groups for _ in group.indices]
    indices = [index for group in groups for index in group.indices]
    rewards = [reward for group in groups for reward in group.rewards]
    return pa.Table.from_arrays([pa.array(c, t) for c, t in zip((ids, indices, rewards), GROUPS.types, strict=True)],
                                schema=GROUPS)  # fmt: skip


def _pairs_table(
    groups: Sequence[_Group], selector: PairSelector, run_seed: int, keep_ties: bool, dropped: dict[str, int]
) -> pa.Table:
    """Table with a row for each pair; counts the prompts without a pair in `dropped`."""
    rows = []
    for group in groups:
        rewards, seed = group.rewards, prompt_seed(run_seed, "select", group.prompt_id)
        if keep_ties:
            rewards = break_ties(rewards, group.digests, seed)
        selected = selector(rewards, group.lengths, group.finished, seed)
        different = [(c, r) for c, r in selected if group.digests[c] != group.digests[r]]
        if not selected:
            dropped["no_reward_difference"] += 1
        elif not different:
            dropped["same_answer"] += 1
        for c, r in different:
            rows.append((group.prompt_id, group.indices[c], group.indices[r], group.rewards[c], group.rewards[r]))
    columns = list(zip(*rows, strict=True)) or [()] * len(PAIRS)
    return pa.Table.from_arrays([pa.array(c, t) for c, t in zip(columns, PAIRS.types, strict=True)], schema=PAIRS)


def _scored_groups(stored: Round) -> list[_Group]:
    """Prompts in the order of their first responses, each with its scored responses."""
    rewards = stored.read("rewards", ["reward"])["reward"].to_pylist()
    groups: dict[str, _Group] = {}
    start = 0
    for table in stored.read_shards("responses", _COLUMNS):
        tokens = table["response_tokens"].combine_chunks()
        columns = [table[name].to_pylist() for name in _COLUMNS[:3]]
        lengths = tokens.value_lengths().to_pylist()
        rows = zip(*columns, lengths, _digests(tokens), rewards[start : start + len(table)], strict=True)
        for prompt_id, index, finished, length, digest, reward in rows:
            group = groups.setdefault(prompt_id, _Group(prompt_id, [], [], [], [], []))
            if reward is not None:
                group.indices.append(index)
                group.rewards.append(reward)
                group.lengths.append(length)
                group.finished.append(finished)
                group.digests.append(digest)
        start += len(table)
    if start != len(rewards):
        raise ValueError(f"{start} responses, but {len(rewards)} rewards.")
    return list(groups.values())


def _digests(tokens: pa.ListArray) -> Iterator[bytes]:
    """Hash of each response's tokens."""
    values: np.ndarray = np.ascontiguousarray(tokens.values.to_numpy())
    for start, end in itertools.pairwise(tokens.offsets.to_numpy()):
        yield hashlib.blake2b(values[start:end].data, digest_size=16).digest()
