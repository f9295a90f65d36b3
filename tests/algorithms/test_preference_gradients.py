"""The DPO family on packed prompt groups against a naive computation from full logits, in any division of an update."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from rlhf_pl import (
    APODownLoss,
    APOZeroLoss,
    ChosenNLL,
    CPOLoss,
    DPOLoss,
    HingeLoss,
    IPOLoss,
    KTOLoss,
    ORPOLoss,
    PolicyLoss,
    RobustDPOLoss,
    SimPOLoss,
    SPPOHardLoss,
    SPPOLoss,
    SumOfLosses,
)
from rlhf_pl.algorithms.loss_terms import sum_of_means, term_losses
from rlhf_pl.data.group_batches import GroupBatch, GroupDataset
from rlhf_pl.data.micro_batches import MicroBatchSampler
from rlhf_pl.data.stored_groups import TOKENS, StoredGroups, StoredPairs
from rlhf_pl.data.update_plan import UpdatePlan
from rlhf_pl.models.policy import PolicyLM
from rlhf_pl.models.shared_prefix import share_prompts

GROUPS, SIZE, Z_REF = 7, 3, 0.4
REWARDS = np.array([[0.5, 2.0, -1.0], [1.0, 1.0, 3.0], [2.0, 1.0, 0.0], [0.1, 0.1, 0.1], [4.0, -1.0, 2.0],
                    [0.0, 1.0, 0.5], [-3.0, 0.0, 1.0]])  # fmt: skip
# (chosen, rejected): of prompts with one, two or three pairs
PAIRS = [[(1, 2)], [(2, 0), (2, 1)], [(0, 1), (0, 2), (1, 2)], [(0, 1)], [(0, 1), (0, 2), (2, 1)], [(1, 0)], [(2, 0)]]


@dataclass
class Response:
    """The numbers of one response: log-probs of its tokens, and sums under the other policies."""

    tokens: Tensor
    old: Tensor
    reference: Tensor

    @property
    def to_reference(self) -> Tensor:
        return self.tokens.sum() - self.reference

    @property
    def to_old(self) -> Tensor:
        return self.tokens.sum() - self.old


Pair = tuple[Response, Response]


def logistic(margin: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(-margin))


def margin(pair: Pair) -> Tensor:
    return pair[0].to_reference - pair[1].to_reference


def odds(response: Response) -> Tensor:
    p = response.tokens.mean().exp()
    return p / (1 - p)


def mean_to_reference(response: Response) -> Tensor:
    return response.to_reference / len(response.tokens)


OF_PAIRS: list[tuple[PolicyLoss, Callable[[Pair], Tensor], float]] = [  # with the weight of the chosen responses' NLL
    (DPOLoss(0.3), lambda p: logistic(0.3 * margin(p)), 0),
    (DPOLoss(0.3, 0.2), lambda p: 0.8 * logistic(0.3 * margin(p)) + 0.2 * logistic(-0.3 * margin(p)), 0),
    (
        RobustDPOLoss(0.3, 0.2),
        lambda p: (0.8 * logistic(0.3 * margin(p)) - 0.2 * logistic(-0.3 * margin(p))) / 0.6,
        0,
    ),
    (IPOLoss(0.5, mean_over_tokens=False), lambda p: (margin(p) - 1) ** 2, 0),
    (IPOLoss(0.5), lambda p: (mean_to_reference(p[0]) - mean_to_reference(p[1]) - 1) ** 2, 0),
    (HingeLoss(0.3), lambda p: torch.clamp(1 - 0.3 * margin(p), min=0), 0),
    (
        APOZeroLoss(0.3),
        lambda p: 1 / (1 + torch.exp(0.3 * p[0].to_reference)) + 1 / (1 + torch.exp(-0.3 * p[1].to_reference)),
        0,
    ),
    (
        APODownLoss(0.3),
        lambda p: 1 / (1 + torch.exp(-0.3 * p[0].to_reference)) + 1 / (1 + torch.exp(0.3 * margin(p))),
        0,
    ),
    (SPPOHardLoss(0.2), lambda p: (p[0].to_old - 2.5) ** 2 + (p[1].to_old + 2.5) ** 2, 0),
    (SimPOLoss(2.0, 0.5), lambda p: logistic(2.0 * (p[0].tokens.mean() - p[1].tokens.mean()) - 0.5), 0),
    (CPOLoss(0.2, 0.7), lambda p: logistic(0.2 * (p[0].tokens.sum() - p[1].tokens.sum())), 0.7),
    (ORPOLoss(0.4), lambda p: -0.4 * torch.log(odds(p[0]) / (odds(p[0]) + odds(p[1]))), 1.0),
    (SumOfLosses([DPOLoss(0.3), ChosenNLL()], [2.0, 0.5]), lambda p: 2 * logistic(0.3 * margin(p)), 0.5),
    (ChosenNLL(), lambda p: torch.zeros(()), 1.0),
]


def kto_value(response: Response, desirable: bool) -> Tensor:
    gain = 0.3 * (response.to_reference - Z_REF)
    return 2 / (1 + torch.exp(gain)) if desirable else 1 / (1 + torch.exp(-gain))


def naive_kto(responses: list[Response], rewards: np.ndarray) -> list[Tensor]:
    labels = [(reward * len(rewards)).round(6) - rewards.sum().round(6) for reward in rewards]
    return [kto_value(r, label > 0) for r, label in zip(responses, labels, strict=True) if label]


def naive_sppo(responses: list[Response], rewards: np.ndarray) -> list[Tensor]:
    wins = [[1 / (1 + np.exp(-2 * (a - b))) for j, b in enumerate(rewards) if j != i] for i, a in enumerate(rewards)]
    return [(r.to_old - (np.mean(w) - 0.5) / 0.2) ** 2 for r, w in zip(responses, wins, strict=True)]


OF_RESPONSES: list[tuple[PolicyLoss, Callable[[list[Response], np.ndarray], list[Tensor]]]] = [
    (KTOLoss(0.3, desirable_weight=2.0), naive_kto),
    (SPPOLoss(0.2, reward_scale=2.0), naive_sppo),
]
CASES = [(loss, lambda *a, f=f, w=w: naive_pairs(f, w, *a)) for loss, f, w in OF_PAIRS]
CASES += [(loss, lambda *a, f=f: naive_responses(f, *a)) for loss, f in OF_RESPONSES]


def naive_pairs(
    value: Callable[[Pair], Tensor], nll_weight: float, responses: list[list[Response]], groups: list[int]
) -> Tensor:
    """The mean over prompts of the mean over their pairs, and the mean NLL of the tokens of chosen responses."""
    means = [torch.stack([value((responses[g][c], responses[g][r])) for c, r in PAIRS[g]]).mean() for g in groups]
    tokens = [responses[g][c].tokens for g in groups for c in sorted({c for c, _ in PAIRS[g]})]
    return torch.stack(means).mean() - nll_weight * torch.cat(tokens).mean()


def naive_responses(
    values: Callable[[list[Response], np.ndarray], list[Tensor]], responses: list[list[Response]], groups: list[int]
) -> Tensor:
    return torch.stack([v for g in groups for v in values(responses[g], REWARDS[g])]).mean()


@pytest.fixture(scope="module")
def lm() -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=50, initializer_range=0.3, **sizes)).eval()


def make_dataset(pairs: bool) -> GroupDataset:
    """Seven prompts with three responses of 1 to 6 tokens each; log-probs of other policies near the policy's."""
    generator = np.random.default_rng(3)
    prompts = [generator.integers(3, 50, 2 + g % 3).tolist() for g in range(GROUPS)]
    responses = [generator.integers(3, 50, 1 + (i * 5) % 6).tolist() for i in range(GROUPS * SIZE)]
    logps = {
        name: torch.tensor([-4.0 * len(r) + generator.normal() for r in responses], dtype=torch.float32)
        for name in ("old_logps", "reference_logps")
    }
    counts = np.array([len(own) for own in PAIRS])
    stored = StoredGroups(
        pa.array([f"p{i // SIZE}" for i in range(GROUPS * SIZE)]),
        np.tile(np.arange(SIZE, dtype=np.int32), GROUPS),
        pa.array([prompts[i // SIZE] for i in range(GROUPS * SIZE)], TOKENS),
        pa.array(responses, TOKENS),
        np.ones(GROUPS * SIZE, bool),
        REWARDS.ravel(),
        np.full(GROUPS, SIZE),
        np.arange(GROUPS * SIZE),
        StoredPairs(np.array([pair for own in PAIRS for pair in own]), counts) if pairs else None,
    )
    return GroupDataset(stored, logps, temperature=0.9)


def naive_tokens(lm: Any, dataset: GroupDataset) -> list[Tensor]:
    """Log-probs of each response's tokens, from the full logits of prompt and response."""
    found = []
    for prompt, response in zip(*(c.to_pylist() for c in (dataset.stored.prompt_tokens,
                                                          dataset.stored.response_tokens)), strict=True):  # fmt: skip
        logits = lm(input_ids=torch.tensor([prompt + response])).logits[0].double() / dataset.temperature
        rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        found.append(rows[torch.arange(len(response)), torch.tensor(response)])
    return found


def naive_responses_of(dataset: GroupDataset, tokens: list[Tensor]) -> list[list[Response]]:
    old, reference = (dataset.logps[name].double() for name in ("old_logps", "reference_logps"))  # type: ignore[union-attr]
    every = [Response(*numbers) for numbers in zip(tokens, old, reference, strict=True)]
    return [every[g * SIZE : (g + 1) * SIZE] for g in range(GROUPS)]


def weighted_loss(loss: PolicyLoss, batch: GroupBatch, token_logps: Tensor) -> Tensor:
    batch.stored["kto_z_ref"] = torch.tensor(Z_REF)
    groups = batch.groups(token_logps)
    return sum_of_means(loss, term_losses(loss, groups), batch.weights, groups)


def ids(cases: list[Any]) -> list[str]:
    return [f"{type(case[0]).__name__}{i}" for i, case in enumerate(cases)]


@pytest.mark.parametrize(("loss", "naive"), CASES, ids=ids(CASES))
def test_loss_and_gradient_equal_a_naive_computation_from_full_logits(
    lm: Any, loss: PolicyLoss, naive: Callable[..., Tensor]
) -> None:
    dataset, parameters = make_dataset(loss.uses_pairs), list(lm.parameters())
    expected = naive(naive_responses_of(dataset, naive_tokens(lm, dataset)), list(range(GROUPS)))
    expected_gradient = torch.autograd.grad(expected, parameters)
    share_prompts(lm)
    batch = dataset.batch(range(GROUPS), (1.0,) * len(loss.terms))
    found = weighted_loss(loss, batch, PolicyLM(lm)(**batch.rows.inputs(), temperature=dataset.temperature))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for actual, wanted in zip(torch.autograd.grad(found, parameters), expected_gradient, strict=True):
        assert (actual - wanted).norm() <= 1e-5 * wanted.norm() + 1e-7


DIVISIONS = {
    "one batch": UpdatePlan(GROUPS, batch_size=GROUPS),
    "a tail": UpdatePlan(GROUPS, batch_size=2, accumulate=2),
    "two ranks, one with fewer": UpdatePlan(GROUPS, batch_size=1, accumulate=4, world_size=2),
    "token budget": UpdatePlan(GROUPS, batch_size=3, accumulate=1, world_size=2, max_tokens=25),
}


@pytest.mark.parametrize("plan", DIVISIONS.values(), ids=DIVISIONS)
@pytest.mark.parametrize(("loss", "naive"), CASES, ids=ids(CASES))
def test_any_division_of_an_update_has_the_same_gradient(
    loss: PolicyLoss, naive: Callable[..., Tensor], plan: UpdatePlan
) -> None:
    """Gradients on the log-probs of all tokens, summed over micro-batches and ranks as Lightning averages them."""
    dataset = make_dataset(loss.uses_pairs)
    lengths = dataset.stored.response_lengths().tolist()
    generator = torch.Generator().manual_seed(5)
    leaves = [-4 + torch.randn(length, generator=generator) for length in lengths]
    for leaf in leaves:
        leaf.requires_grad_()
    samplers = [
        MicroBatchSampler(plan, "seed", rank, dataset.lengths(), dataset.sizes(loss)) for rank in range(plan.world_size)
    ]
    batches = [list(sampler) for sampler in samplers]
    accumulate = samplers[0].accumulate
    for start in range(0, len(batches[0]), accumulate):
        update = [batch for own in batches for batch in own[start : start + accumulate]]
        total = torch.zeros(())
        for indices, weights in update:
            tokens = torch.cat([leaves[row] for g in indices for row in dataset.stored.rows(g)])
            total = total + weighted_loss(loss, dataset.batch(indices, weights), tokens)
        found = torch.autograd.grad(total / accumulate / plan.world_size, leaves, allow_unused=True)
        responses = naive_responses_of(dataset, [leaf.double() for leaf in leaves])
        groups = sorted({g for indices, weights in update if any(weights) for g in indices})
        expected = torch.autograd.grad(naive(responses, groups), leaves, allow_unused=True)
        for leaf, *gradients in zip(leaves, found, expected, strict=True):
            actual, wanted = (torch.zeros_like(leaf) if gradient is None else gradient for gradient in gradients)
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)
