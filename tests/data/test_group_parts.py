"""Groups above the token budget are split; the gradient does not depend on the division of an update."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from rlhf_pl import PolicyLoss, RebelLoss, SumOfLosses
from rlhf_pl.algorithms.group_subsets import select_groups
from rlhf_pl.algorithms.loss_terms import sum_of_means, term_losses
from rlhf_pl.algorithms.prompt_groups import Z_REF, PromptGroups
from rlhf_pl.data.group_batches import GroupBatch, GroupDataset
from rlhf_pl.data.group_parts import split_groups
from rlhf_pl.data.group_sampler import GroupSampler
from rlhf_pl.data.mismatched import mismatch_prompts
from rlhf_pl.data.stored_groups import TOKENS, StoredGroups, StoredPairs
from rlhf_pl.data.update_plan import UpdatePlan
from rlhf_pl.models.packed_batch import PackedBatch
from rlhf_pl.models.policy import PolicyLM, load_lm
from rlhf_pl.models.source import ModelSource
from rlhf_pl.modules.ahead_pass import AheadPass

SIZES = (4, 3, 5, 2, 4)  # responses of each group
UNSPLIT = 1000


def make_dataset() -> GroupDataset:
    """Five groups with all their pairs; prompts of 4 tokens, responses of 1 to 10, the longest group of 37 tokens."""
    random, count = np.random.default_rng(3), sum(SIZES)
    lengths = random.integers(1, 11, count)
    group_of = np.repeat(np.arange(len(SIZES)), SIZES)
    pairs = [[(i, j) for i in range(n) for j in range(i + 1, n)] for n in SIZES]
    groups = StoredGroups(
        pa.array([f"p{g}" for g in group_of]),
        np.concatenate([np.arange(n) for n in SIZES]).astype(np.int32),
        pa.array([[3 + g, 7, 9, 11] for g in group_of], TOKENS),
        pa.array([random.integers(5, 300, n).tolist() for n in lengths], TOKENS),
        random.random(count) < 0.7,
        random.random(count),
        np.array(SIZES),
        np.arange(count),
        StoredPairs(np.concatenate(pairs), np.array([len(p) for p in pairs])),
    )
    old = torch.tensor(-6.0 * lengths + random.normal(size=count), dtype=torch.float32)
    values = pa.array([random.normal(-6, 1, n).astype(np.float32) for n in lengths], pa.list_(pa.float32()))
    references = {"reference_logps": old - 0.5, Z_REF: -10.0 * torch.from_numpy(lengths).float()}
    return GroupDataset(groups, {"old_logps": old, "old_token_logps": values, **references}, temperature=0.9)


def make_sampler(dataset: GroupDataset, loss: PolicyLoss, budget: int, world: int = 1, rank: int = 0) -> GroupSampler:
    """The five groups in updates of 3 and 2 groups, or of 4 and 1 on two ranks."""
    accumulate = 3 if world == 1 else 2
    plan = UpdatePlan(len(SIZES), 1, accumulate, world, budget)
    parts = split_groups(dataset.stored, budget)
    mismatched = mismatch_prompts(dataset.stored)
    assert mismatched is not None
    dataset.parts, dataset.mismatched = parts, split_groups(mismatched, budget) if Z_REF in loss.needs else None
    return GroupSampler(plan, "order", rank, parts, True, dataset.sizes(loss), dataset.mismatched)


@pytest.mark.parametrize("budget", [12, 20, 30, UNSPLIT])
def test_parts_have_each_response_once_and_stay_within_the_budget(budget: int) -> None:
    groups = make_dataset().stored
    parts = split_groups(groups, budget)
    seen: dict[int, list[int]] = {g: [] for g in range(len(SIZES))}
    for item, group in sorted(enumerate(parts.group_of.tolist()), key=lambda p: (p[1], parts.firsts[p[0]])):
        seen[group] += parts.items.rows(item).tolist()
        size, length = int(parts.items.sizes[item]), parts.items.lengths()[item]
        assert length <= budget or size == 1
        assert list(parts.items.prefix_group(item).prompt) == [3 + group, 7, 9, 11]
    assert seen == {g: groups.rows(g).tolist() for g in seen}
    assert set(parts.split) == {g for g, n in enumerate(groups.lengths()) if n > budget}
    assert budget != 12 or {len(items) for items in parts.split.values()} == {2, 3}


class Spread(PolicyLoss):
    """REBEL on all pairs in closed form."""

    def losses(self, groups: PromptGroups) -> Tensor:
        residuals = groups.logps - groups.old_logps - groups.rewards
        return groups.sum_per_group((residuals - groups.group_means(residuals)) ** 2)


class Clipped(PolicyLoss):
    """A token loss that leaves out truncated responses, and whose tokens depend on their whole group."""

    needs = frozenset({"rewards", "old_token_logps"})
    per = "token"

    def counts(self, lengths: Tensor, finished: Tensor) -> Tensor:
        return lengths * finished

    def losses(self, groups: PromptGroups) -> Tensor:
        gains = groups.per_token(groups.rewards - groups.group_means(groups.logps))
        return (gains * (groups.token_logps - groups.old_token_logps))[groups.per_token(groups.finished)]


class Relative(PolicyLoss):
    """KTO with desirable responses alone."""

    needs = frozenset({"reference_logps", Z_REF})
    per = "response"

    def losses(self, groups: PromptGroups) -> Tensor:
        return (0.03 * (groups.stored[Z_REF] - groups.logps + groups.reference_logps)).sigmoid()


class Gathered:
    """Stands for the other ranks: collects what each rank gives, call by call, then returns all of it."""

    def __init__(self, size: int) -> None:
        self.size, self.call, self.is_complete = size, 0, False
        self.values: list[list[Any]] = []

    def all_gather(self, value: Any) -> Sequence[Any]:
        if not self.is_complete:
            self.values += [[]] if len(self.values) == self.call else []
            self.values[self.call].append(value)
        self.call += 1
        return self.values[self.call - 1]


def gradients(unit: PolicyLM, loss: PolicyLoss, budget: int, world: int = 1) -> list[tuple[Tensor, float, float]]:
    """Gradient of each update, its loss, and the largest difference between the pass ahead and the training's."""
    dataset, found = make_dataset(), []
    samplers = [make_sampler(dataset, loss, budget, world, rank) for rank in range(world)]
    batches = [[dataset.batch(*request) for request in sampler] for sampler in samplers]
    count = samplers[0].accumulate
    assert len({len(b) for b in batches}) == 1

    def logps(rows: PackedBatch) -> Tensor:
        assert rows.input_ids.shape[1] <= budget or rows.num_responses == 1
        return unit(**rows.inputs(), temperature=0.9)

    for start in range(0, len(batches[0]), count):
        update = [of_rank[start : start + count] for of_rank in batches]
        aheads, gathered = [AheadPass() for _ in update], Gathered(world)
        calls = {(len(a.parts), len(a.mismatched)) if (a := own[0].ahead) else (0, 0) for own in update}
        assert len(calls) == 1  # sharded policies need equally many calls on all ranks
        for gathered.is_complete in (False, True):
            for ahead, own in zip(aheads, update, strict=True):
                gathered.call = 0
                if own[0].ahead is not None:
                    ahead.compute(own[0].ahead, lambda rows: (logps(rows), {}), gathered, torch.device("cpu"))  # type: ignore[arg-type]
        unit.zero_grad()
        total, numbers, difference = 0.0, [], 0.0
        for ahead, own in zip(aheads, update, strict=True):
            for batch in own:
                token_logps = logps(batch.rows)
                difference = max(difference, _difference(batch, token_logps, ahead))
                groups = batch.groups(token_logps, known=ahead.token_logps, numbers_of_update=ahead.numbers)
                assert Z_REF not in loss.needs or groups.stored[Z_REF] > 0.1
                losses = term_losses(loss, groups)
                (sum_of_means(loss, losses, batch.weights, groups) / count / world).backward()
                if batch.parts is not None:
                    groups = select_groups(groups, batch.parts.counted) if batch.parts.counted else None
                if groups is not None and batch.counts:
                    numbers += torch.cat(term_losses(loss, groups)).tolist()
        total = sum(numbers) / len(numbers)
        gradient = torch.cat([p.grad.flatten() for p in unit.parameters() if p.grad is not None])
        found.append((gradient.clone(), total, difference))
    return found


def _difference(batch: GroupBatch, token_logps: Tensor, ahead: AheadPass) -> float:
    if batch.parts is None:
        return 0.0
    parts = batch.parts.by_part(token_logps.detach()).items()
    return max(float((ahead.token_logps[g][b : b + len(v)] - v).abs().max()) for (g, b), v in parts)


LOSSES = [RebelLoss(eta=1.0), Spread(), Clipped(), Relative(), SumOfLosses([Spread(), Clipped()], [1.0, 0.1])]


@pytest.mark.parametrize("loss", LOSSES)
def test_any_division_of_an_update_gives_the_same_gradient(loss: PolicyLoss, source: ModelSource) -> None:
    """In updates of 3 and 2 groups of one rank, and of 4 and 1 groups on two."""
    unit = PolicyLM(load_lm(source))
    for world in (1, 2):
        whole = gradients(unit, loss, UNSPLIT, world)
        for budget in (12, 20, 30):
            split = gradients(unit, loss, budget, world)
            for (wanted, value, _), (found, same, difference) in zip(whole, split, strict=True):
                assert (found - wanted).norm() < 1e-5 * wanted.norm()
                assert same == pytest.approx(value, rel=1e-5)
                assert difference == 0  # an unchanged policy gives identical numbers
