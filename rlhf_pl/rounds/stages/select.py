"""Selects what a round trains on: pairs of scored responses, or whole groups."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rlhf_pl.algorithms.pair_selection import Pair, PairSelector
from rlhf_pl.algorithms.reward_shaping import RewardShaping, break_ties, shape_rewards
from rlhf_pl.data.stored_groups import GROUPS, PAIRS
from rlhf_pl.rounds.stages.generate import prompt_seed
from rlhf_pl.store.round_store import Round
from rlhf_pl.utils.errors import InputError

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
    truncated: bool = False  # whether any of its responses is, also of those without a score


def select(
    stored: Round,
    selector: PairSelector | None,
    run_seed: int,
    limit: int | None = None,
    shaping: RewardShaping = RewardShaping(),  # noqa: B008 - frozen
    keep_ties: bool = False,
    uses_ties: bool = True,
    drop_equal: bool = False,
    least: int = 2,
    drop_truncated: bool = False,
) -> None:
    """Select pairs or groups to train on, and count the prompts without any, by reason.

    Args:
        stored: The round. Its responses and rewards are read and its stage `pairs` is written: indices into each
            prompt's responses, and shaped rewards.
        selector: Selects pairs; None for whole groups, of the prompts with at least `least` scored responses.
        run_seed: The run's seed.
        limit: Maximum number of prompts with pairs, or of groups.
        shaping: Penalties and normalisation, applied to the scores first.
        keep_ties: Keep pairs with equal rewards, because a KL term will break the tie. The selector sees such rewards
            in a random order.
        uses_ties: Whether the loss can use pairs with equal rewards.
        drop_equal: Drop whole groups whose shaped rewards are all equal.
        least: Number of scored responses that a prompt needs.
        drop_truncated: Drop prompts with a truncated response, before rewards are shaped.

    Raises:
        InputError: The selector returned something else than pairs of a prompt's responses.
    """
    how = (selector, run_seed, limit, shaping, keep_ties, uses_ties, drop_equal, least, drop_truncated)
    table, info = make_selection(stored, *how)
    stored.write_shard("pairs", 0, table)
    stored.complete("pairs", **info)


def count_usable(stored: Round, *arguments: Any) -> int:
    """Number of a round's prompts that `select` with the same arguments would give pairs or a group."""
    return pc.count_distinct(make_selection(stored, *arguments)[0]["prompt_id"]).as_py()


def make_selection(
    stored: Round,
    selector: PairSelector | None,
    run_seed: int,
    limit: int | None,
    shaping: RewardShaping,
    keep_ties: bool,
    uses_ties: bool,
    drop_equal: bool,
    least: int = 2,
    drop_truncated: bool = False,
) -> tuple[pa.Table, dict[str, Any]]:
    """The table that `select` writes with the same arguments, and its counts; writes nothing."""
    sampled = _scored_groups(stored)
    groups = [group for group in sampled if not (drop_truncated and group.truncated)]
    rewards, lengths, finished = (
        [getattr(group, name) for group in groups] for name in ("rewards", "lengths", "finished")
    )
    shaped, penalties = shape_rewards(rewards, lengths, finished, shaping)
    for group, group_rewards in zip(groups, shaped, strict=True):
        group.rewards = group_rewards
    usable = [group for group in groups if len(group.indices) >= least]
    dropped = {"no_reward_difference": 0, "same_answer": 0, "not_scored": len(groups) - len(usable)}
    if drop_truncated:
        dropped["truncated_response"] = len(sampled) - len(groups)
    if selector is None:
        different = [group for group in usable if not drop_equal or len(set(group.rewards)) > 1]
        dropped["no_reward_difference"] = len(usable) - len(different)
        usable = different[:limit]
        table = _groups_table(usable)
        equal = sum(len(group.indices) > 1 and len(set(group.rewards)) == 1 for group in usable)
        counts = {"pairs": len(usable), "groups": len(usable), "responses": len(table), "equal_rewards": equal}
    else:
        pairs = _select_pairs(usable, selector, run_seed, (keep_ties, uses_ties), dropped)[:limit]
        table = _pairs_table(pairs)
        responses = sum(len({index for pair in selected for index in pair}) for _, selected in pairs)
        counts = {"pairs": len(table), "groups": len(pairs), "responses": responses, "grouped": True}
        if keep_ties:
            counts["kept_ties"] = pc.sum(pc.equal(table["chosen_reward"], table["rejected_reward"])).as_py() or 0
    return table, {
        "prompts": len(sampled),
        **counts,
        "dropped": dropped,
        "selector": None if selector is None else type(selector).__name__,
        "penalties": penalties,
        "reward_variance": _reward_variance([group.rewards for group in usable]),
    }


def _reward_variance(groups: Sequence[Sequence[float]]) -> float:
    """Mean over prompts of the (unbiased) variance of their responses' shaped rewards; `eta: auto` reads it."""
    variances = []
    for rewards in groups:
        mean = sum(rewards) / len(rewards)
        variances.append(sum((reward - mean) ** 2 for reward in rewards) / max(1, len(rewards) - 1))
    return sum(variances) / max(1, len(variances))


def _groups_table(groups: Sequence[_Group]) -> pa.Table:
    """Table with a row for each response."""
    ids = [group.prompt_id for group in groups for _ in group.indices]
    indices = [index for group in groups for index in group.indices]
    rewards = [reward for group in groups for reward in group.rewards]
    return pa.Table.from_arrays([pa.array(c, t) for c, t in zip((ids, indices, rewards), GROUPS.types, strict=True)],
                                schema=GROUPS)  # fmt: skip


def _select_pairs(
    groups: Sequence[_Group],
    selector: PairSelector,
    run_seed: int,
    ties: tuple[bool, bool],
    dropped: dict[str, int],
) -> list[tuple[_Group, list[Pair]]]:
    """Each prompt that has pairs, with them; counts the others in `dropped`."""
    keep_ties, uses_ties = ties
    prompts = []
    for group in groups:
        rewards, seed = group.rewards, prompt_seed(run_seed, "select", group.prompt_id)
        if keep_ties:
            rewards = break_ties(rewards, group.digests, seed)
        selected = list(selector(rewards, group.lengths, group.finished, seed))
        _check_pairs(selected, group, rewards, selector)
        if not keep_ties:
            if not uses_ties:
                selected = [(c, r) for c, r in selected if rewards[c] != rewards[r]]
            if all(rewards[c] == rewards[r] for c, r in selected):
                selected = []
        different = [(c, r) for c, r in selected if group.digests[c] != group.digests[r]]
        if not selected:
            dropped["no_reward_difference"] += 1
        elif not different:
            dropped["same_answer"] += 1
        else:
            prompts.append((group, different))
    return prompts


def _check_pairs(selected: Sequence[Pair], group: _Group, rewards: Sequence[float], selector: PairSelector) -> None:
    """Raise InputError unless all of `selected` are different pairs whose chosen response is not the worse one."""
    count, name = len(group.indices), type(selector).__name__
    for chosen, rejected in selected:
        what = f"`rollout.selector`: {name} returned the pair ({chosen}, {rejected}) for prompt_id {group.prompt_id!r}"
        if not (0 <= chosen < count and 0 <= rejected < count and chosen != rejected):
            raise InputError(
                f"{what}, which has {count} responses. Return two different indices from 0 to {count - 1}."
            )
        if rewards[chosen] < rewards[rejected]:
            raise InputError(
                f"{what}, whose chosen response has the lower reward ({rewards[chosen]:g} against "
                f"{rewards[rejected]:g}). Return (better, worse)."
            )
    if len({frozenset(pair) for pair in selected}) < len(selected):
        raise InputError(f"`rollout.selector`: {name} returned a pair twice for prompt_id {group.prompt_id!r}.")


def _pairs_table(prompts: Sequence[tuple[_Group, list[Pair]]]) -> pa.Table:
    """Table with a row for each pair."""
    rows = [
        (group.prompt_id, group.indices[c], group.indices[r], group.rewards[c], group.rewards[r])
        for group, pairs in prompts
        for c, r in pairs
    ]
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
            group.truncated |= not finished
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
