"""Loss, gradient and metrics of policy gradients equal a naive computation, however an update is divided.

Five prompts with 2 to 5 responses, one of them with truncated responses alone, in an update of one batch, of
micro-batches, on two ranks of which one has fewer groups, and of micro-batches with single parts of groups.
"""

import math
import statistics
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from rlhf_pl import (
    CISPOLoss,
    DAPOLoss,
    DrGRPOLoss,
    GRPOLoss,
    GSPOLoss,
    ImportanceCorrection,
    KLTerm,
    ReinforceLoss,
    ReinforcePlusPlusLoss,
    RLOOLoss,
)
from rlhf_pl.algorithms.group_subsets import select_groups
from rlhf_pl.algorithms.loss_terms import sum_of_means, summarised, term_losses
from rlhf_pl.algorithms.policy_loss import logged
from rlhf_pl.data.group_batches import GroupDataset
from rlhf_pl.data.group_parts import split_groups
from rlhf_pl.data.group_sampler import GroupSampler
from rlhf_pl.data.stored_groups import TOKENS, StoredGroups
from rlhf_pl.data.update_plan import UpdatePlan
from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.models.packed_batch import PackedBatch
from rlhf_pl.models.policy import PolicyLM, load_lm
from rlhf_pl.models.source import ModelSource
from rlhf_pl.modules.ahead_pass import AheadPass
from rlhf_pl.modules.logging import Means
from tests.data.test_group_parts import Gathered

SIZES = (4, 3, 5, 2, 4)  # responses of each group
COUNT, TEMPERATURE, KL_COEF = sum(SIZES), 0.9, 0.2
LOSSES: dict[str, Any] = {
    "RLOO": RLOOLoss(0.1, 0.2),
    "RLOO, masked": RLOOLoss(0.1, None, truncated="mask"),
    "RLOO, corrected": RLOOLoss(correction=ImportanceCorrection("truncate", "sequence", high=1.1, low=0.8)),
    "GRPO": GRPOLoss(0.05, 0.1, kl=KLTerm(0.3)),
    "GRPO, k2": GRPOLoss(0.05, 0.1, kl=KLTerm(0.3, "k2")),
    "GRPO, token": GRPOLoss(0.05, 0.1, "token", kl=KLTerm(0.3, by_ratio=False)),
    "GRPO, masked": GRPOLoss(0.05, 0.1, truncated="mask", kl=KLTerm(0.3)),
    "GRPO, corrected": GRPOLoss(0.05, 0.1, correction=ImportanceCorrection("mask", "token", high=1.05, low=0.95)),
    "Dr. GRPO": DrGRPOLoss(12, 0.05, 0.1, kl=KLTerm(0.3)),
    "Dr. GRPO, masked": DrGRPOLoss(12, 0.05, 0.1, truncated="mask"),
    "DAPO": DAPOLoss(0.05, 0.1, kl=KLTerm(0.3)),
    "DAPO, masked": DAPOLoss(0.05, 0.1, truncated="mask", kl=KLTerm(0.3)),
    "GSPO": GSPOLoss(0.01, 0.02, kl=KLTerm(0.3)),
    "GSPO, masked": GSPOLoss(0.01, 0.02, truncated="mask"),
    "CISPO": CISPOLoss(0.05, kl=KLTerm(0.3)),
    "CISPO, masked": CISPOLoss(0.05, truncated="mask", kl=KLTerm(0.3, "k2")),
    "REINFORCE": ReinforceLoss(),
    "REINFORCE, no baseline": ReinforceLoss("none"),
    "REINFORCE++": ReinforcePlusPlusLoss(False, 0.05, 0.1),
    "REINFORCE++, baseline, masked": ReinforcePlusPlusLoss(True, 0.05, 0.1, truncated="mask", kl=KLTerm(0.3, "k2")),
    "REINFORCE++, responses": ReinforcePlusPlusLoss(True, 0.05, None, "response"),
}
DIVISIONS = {
    "one batch": UpdatePlan(len(SIZES), batch_size=5),
    "micro-batches and a tail": UpdatePlan(len(SIZES), batch_size=2, accumulate=3),
    "single groups on two ranks": UpdatePlan(len(SIZES), batch_size=1, accumulate=3, world_size=2),
    "parts": UpdatePlan(len(SIZES), batch_size=5, max_tokens=20),
    "single responses on two ranks": UpdatePlan(len(SIZES), batch_size=5, world_size=2, max_tokens=6),
}


@cache
def make_unit(model: str) -> PolicyLM:
    return PolicyLM(load_lm(ModelSource(model)))


def naive_token_logps(lm: Any, groups: StoredGroups) -> list[Tensor]:
    """Log-probs of the tokens of each response, from full logits, with gradient."""
    found = []
    for prompt, response in zip(groups.prompt_tokens.to_pylist(), groups.response_tokens.to_pylist(), strict=True):
        logits = lm(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        table = (logits / TEMPERATURE).log_softmax(-1)
        found.append(table.gather(-1, torch.tensor(response)[:, None]).squeeze(-1))
    return found


@cache
def make_dataset(model: str) -> GroupDataset:
    """The policy has moved by 0.1 nats a token from pi_old, which is as far from the sampler, and from pi_ref."""
    random = np.random.default_rng(3)
    lengths = random.integers(1, 11, COUNT)
    group_of = np.repeat(np.arange(len(SIZES)), SIZES)
    rewards = random.random(COUNT).round(3)
    rewards[:4] = 0.25  # the first group has no variance
    groups = StoredGroups(
        pa.array([f"p{g}" for g in group_of]),
        np.concatenate([np.arange(n) for n in SIZES]).astype(np.int32),
        pa.array([[3 + g, 7, 9, 11] for g in group_of], TOKENS),
        pa.array([random.integers(5, 300, n).tolist() for n in lengths], TOKENS),
        (random.random(COUNT) < 0.7) & (group_of != 3),
        rewards,
        np.array(SIZES),
        np.arange(COUNT),
        None,
    )
    policy = [row.detach().numpy() for row in naive_token_logps(make_unit(model).lm, groups)]

    def near(rows: list[np.ndarray]) -> list[np.ndarray]:
        return [(row + random.normal(0, 0.1, len(row))).astype(np.float32) for row in rows]

    old = near(policy)
    tokens = {"old": old, "reference": near(old), "sampling": near(old)}
    logps: dict[str, Any] = {
        f"{name}_token_logps": pa.array(rows, pa.list_(pa.float32())) for name, rows in tokens.items()
    }
    for name in ("old", "reference"):
        logps[f"{name}_logps"] = torch.tensor([float(row.sum()) for row in tokens[name]])
    return GroupDataset(groups, logps, TEMPERATURE)


@dataclass
class Response:
    """A response with numbers of its own: log-probs by policy, advantages of its tokens, weights of the correction."""

    new: Tensor
    old: Tensor
    reference: Tensor
    sampling: Tensor
    reward: float
    finished: bool
    group: int
    advantages: list[float]

    @property
    def ratios(self) -> Tensor:
        return (self.new - self.old).exp()


def naive_responses(dataset: GroupDataset, new: list[Tensor]) -> list[Response]:
    stored, group_of = dataset.stored, np.repeat(np.arange(len(SIZES)), SIZES)
    tokens = [
        [torch.tensor(row) for row in dataset.logps[f"{name}_token_logps"].to_pylist()]  # type: ignore[union-attr]
        for name in ("old", "reference", "sampling")
    ]
    rows = zip(new, *tokens, stored.rewards.tolist(), stored.finished.tolist(), group_of.tolist(), strict=True)
    return [Response(*row, []) for row in rows]  # type: ignore[arg-type]


def naive_advantages(loss: Any, responses: list[Response]) -> None:
    """By the definitions, with Python's floats; REINFORCE++ by NumPy, over all tokens of the round."""
    if isinstance(loss, ReinforcePlusPlusLoss):
        returns = []
        for row in responses:
            mean = statistics.fmean(other.reward for other in responses if other.group == row.group)
            rewards = -KL_COEF * (row.old - row.reference).double().numpy()
            rewards[-1] += row.reward - (mean if loss.baseline else 0)
            returns.append(np.array([rewards[i:].sum() for i in range(len(rewards))]))
        every = np.concatenate(returns)
        for row, own in zip(responses, returns, strict=True):
            row.advantages = ((own - every.mean()) / math.sqrt(every.var(ddof=1) + 1e-8)).tolist()
        return
    rewards = [row.reward - KL_COEF * float((row.old - row.reference).sum()) for row in responses]
    for i, row in enumerate(responses):
        own = [r for r, other in zip(rewards, responses, strict=True) if other.group == row.group]
        advantage = rewards[i] - statistics.fmean(own)
        if isinstance(loss, RLOOLoss) or getattr(loss, "advantage", "") == "leave_one_out":
            advantage *= len(own) / (len(own) - 1)
        elif getattr(loss, "advantage", "") == "none":
            advantage = rewards[i]
        elif not isinstance(loss, DrGRPOLoss):
            advantage /= statistics.stdev(own) + 1e-4
        row.advantages = [advantage] * len(row.new)


def naive_token_values(loss: Any, row: Response) -> list[Tensor]:
    """The value of each token, one after the other."""
    values = []
    sequence = {"sequence": (row.new - row.old).sum().exp(), "sequence_mean": (row.new - row.old).mean().exp()}
    for i, advantage in enumerate(row.advantages):
        ratio = row.ratios[i] if loss.ratio == "token" else sequence[loss.ratio]
        low = -math.inf if loss.clip_low is None else 1 - loss.clip_low
        high = math.inf if loss.clip_high is None else 1 + loss.clip_high
        if isinstance(loss, CISPOLoss):
            value = -min(ratio.item(), high) * advantage * row.new[i]
        elif (advantage > 0 and ratio > high) or (advantage < 0 and ratio < low):
            value = torch.tensor(-(high if advantage > 0 else low) * advantage)
        else:
            value = -ratio * advantage
        if loss.correction is not None:
            difference = row.old - row.sampling
            weight = (difference[i] if loss.correction.level == "token" else difference.sum()).exp().item()
            inside = loss.correction.low <= weight <= loss.correction.high
            limited = min(max(weight, loss.correction.low), loss.correction.high)
            value = value * (weight if inside else limited if loss.correction.mode == "truncate" else 0.0)
        if loss.kl is not None:
            d = row.new[i] - row.reference[i]
            kl = d * d / 2 if loss.kl.estimator == "k2" else (-d).exp() - 1 + d
            factor = ratio.detach() if loss.kl.estimator == "k2" else ratio
            value = value + loss.kl.coef * kl * (factor if loss.kl.by_ratio else 1)
        values.append(value)
    return values


def naive_loss(loss: Any, responses: list[Response]) -> Tensor:
    if isinstance(loss, ReinforceLoss):
        return torch.stack([-row.advantages[0] * row.new.sum() for row in responses]).mean()
    kept = [row for row in responses if row.finished or loss.truncated == "keep"]
    values = [torch.stack(naive_token_values(loss, row)) for row in kept]
    if loss.aggregation == "token":
        return torch.cat(values).mean()
    sums = [row.sum() / (len(row) if loss.aggregation == "response" else loss.constant_tokens) for row in values]
    return torch.stack(sums).sum() / len(responses)


def naive_metrics(loss: Any, responses: list[Response]) -> dict[str, float]:
    """Metrics from their definitions: all of them means over tokens, except those of ratios of whole responses."""
    new, old, reference = (torch.cat([getattr(row, n) for row in responses]) for n in ("new", "old", "reference"))
    if isinstance(loss, ReinforceLoss):
        return {"entropy": -new.mean().item()}
    weights = (new - old).exp()
    k1 = {"kl_old": old - new, "kl_reference": new - reference}
    found = {"entropy": -(weights * new).mean().item()}
    for name, d in k1.items():
        if name == "kl_old" or loss.kl is not None:
            w = 1 if name == "kl_old" else weights
            estimates = {"k1": d, "k2": d * d / 2, "k3": (-d).exp() - 1 + d}
            found |= {f"{name}/{k}": (w * value).mean().item() for k, value in estimates.items()}
    kept = [row for row in responses if row.finished or loss.truncated == "keep"]
    ratios = torch.cat([row.ratios for row in kept])
    advantages = torch.tensor([a for row in kept for a in row.advantages])
    if loss.ratio != "token":
        logs = [(row.new - row.old).sum() / (len(row.new) if loss.ratio == "sequence_mean" else 1) for row in kept]
        ratios, advantages = torch.stack(logs).exp(), torch.tensor([row.advantages[0] for row in kept])
    if loss.clip_low is not None:
        found["clip_low"] = ((ratios < 1 - loss.clip_low) & (advantages < 0)).float().mean().item()
    if loss.clip_high is not None:
        found["clip_high"] = ((ratios > 1 + loss.clip_high) & (advantages > 0)).float().mean().item()
    found["ess"] = (ratios.sum() ** 2 / (ratios**2).sum() / len(ratios)).item()
    return found


class Whole(Ranks):
    """Stands for all ranks: their means are added to one object."""

    def __init__(self) -> None:
        pass

    def all_gather(self, value: Any) -> list[Any]:
        return [value]


def carry_out(unit: PolicyLM, loss: Any, dataset: GroupDataset, plan: UpdatePlan) -> tuple[Tensor, dict[str, float]]:
    """Gradient of the only update, over all micro-batches of all ranks, and its metrics."""
    dataset.parts = split_groups(dataset.stored, plan.max_tokens)
    dataset.compute_values(loss, KL_COEF)
    sizes = dataset.sizes(loss, KL_COEF)
    samplers = [
        GroupSampler(plan, "seed", rank, dataset.parts, plan.max_tokens is not None, sizes)
        for rank in range(plan.world_size)
    ]
    assert plan.updates == 1
    update = [[dataset.batch(*request) for request in sampler] for sampler in samplers]

    def logps(rows: PackedBatch) -> Tensor:
        return unit(**rows.inputs(), temperature=TEMPERATURE)

    aheads, gathered = [AheadPass() for _ in update], Gathered(plan.world_size)
    for gathered.is_complete in (False, True):
        for ahead, own in zip(aheads, update, strict=True):
            gathered.call = 0
            if own[0].ahead is not None:
                ahead.compute(own[0].ahead, lambda rows: (logps(rows), {}), gathered, torch.device("cpu"))  # type: ignore[arg-type]
    unit.zero_grad()
    means = Means()
    for ahead, own in zip(aheads, update, strict=True):
        for batch in own:
            groups = batch.groups(logps(batch.rows), KL_COEF, ahead.token_logps, ahead.numbers)
            losses = term_losses(loss, groups)
            (sum_of_means(loss, losses, batch.weights, groups) / len(own) / plan.world_size).backward()
            counted = list(range(len(batch))) if batch.parts is None else batch.parts.counted
            if counted and batch.counts:
                groups = select_groups(groups, counted)
                means.add(loss=term_losses(loss, groups)[0], **logged(loss, groups))
    gradient = torch.cat([p.grad.flatten() for p in unit.parameters() if p.grad is not None])
    metrics = summarised(loss, means.compute_and_reset("train", Whole()), "train")
    return gradient, {name.removeprefix("train/"): value for name, value in metrics.items()}


@pytest.mark.parametrize("name", LOSSES)
def test_every_division_equals_the_naive_computation(name: str, llama: Any) -> None:
    loss, unit, dataset = LOSSES[name], make_unit(str(llama)), make_dataset(str(llama))
    responses = naive_responses(dataset, naive_token_logps(unit.lm, dataset.stored))
    naive_advantages(loss, responses)
    expected = naive_loss(loss, responses)
    unit.zero_grad()
    expected.backward()
    wanted = torch.cat([p.grad.flatten() for p in unit.parameters() if p.grad is not None]).clone()
    numbers = naive_metrics(loss, responses) | {"loss": expected.item()}
    if loss.needs >= {"old_token_logps"} and getattr(loss, "clip_high", None) is not None:
        assert numbers["clip_high"] > 0
    for division, plan in DIVISIONS.items():
        gradient, metrics = carry_out(unit, loss, dataset, plan)
        assert (gradient - wanted).norm() < 2e-5 * wanted.norm(), division
        found = {key: metrics[key] for key in numbers}
        assert found == pytest.approx(numbers, rel=1e-4, abs=1e-6), division
