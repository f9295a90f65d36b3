"""PPO's loss against independent computations: loops in NumPy, and the formulas of TRL's PPO on padded rows."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import rlhf_pl
from rlhf_pl.algorithms.gae import gae
from rlhf_pl.algorithms.loss_terms import sum_of_means, summarised, term_losses
from rlhf_pl.algorithms.policy_loss import PolicyLoss, check_needs
from rlhf_pl.algorithms.ppo_loss import PPOLoss, PPOPolicyLoss, ValueLoss, clipped_value_loss
from rlhf_pl.algorithms.prompt_groups import PromptGroups, segment_sums
from rlhf_pl.algorithms.reinforce_losses import whiten
from rlhf_pl.utils.errors import InputError

LENGTHS = [5, 1, 8, 3, 8, 2]  # of a response to each of six prompts
LONGEST = max(LENGTHS)


def make_round(kl_coef: float = 0.05) -> PromptGroups:
    """A round as it is stored: the current policy and values have moved a little from the old ones."""
    numbers = torch.Generator().manual_seed(3)
    tokens = sum(LENGTHS)

    def normal(count: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(count, generator=numbers)

    old, reference = -normal(tokens).abs(), -normal(tokens).abs()
    token_logps = (old + normal(tokens, 0.3)).requires_grad_()
    old_values = normal(tokens)
    values = (old_values + normal(tokens, 0.3)).requires_grad_()
    lengths = torch.tensor(LENGTHS)
    sums = {"old_logps": segment_sums(old, lengths), "reference_logps": segment_sums(reference, lengths)}
    stored = {
        "old_token_logps": old,
        "reference_token_logps": reference,
        "old_values": old_values,
        "values": values,
        **sums,
    }
    rewards = normal(len(LENGTHS)) - kl_coef * (sums["old_logps"] - sums["reference_logps"])
    finished = torch.tensor([True, True, False, True, True, False])
    logps = segment_sums(token_logps, lengths)
    return PromptGroups(
        token_logps, logps, rewards, lengths, finished, torch.ones_like(lengths), stored, kl_coef=kl_coef
    )


def part(groups: PromptGroups, start: int, end: int) -> PromptGroups:
    """The responses from `start` to `end`, of one response a group."""
    ends = [0, *np.cumsum(LENGTHS)]
    tokens, rows = slice(ends[start], ends[end]), slice(start, end)
    count = len(groups.lengths)
    stored = {name: values[rows if len(values) == count else tokens] for name, values in groups.stored.items()}
    return PromptGroups(
        groups.token_logps[tokens],
        groups.logps[rows],
        groups.rewards[rows],
        groups.lengths[rows],
        groups.finished[rows],
        groups.sizes[rows],
        stored,
        kl_coef=groups.kl_coef,
    )


def prepare(loss: PolicyLoss, groups: PromptGroups) -> PromptGroups:
    """Add what the loss computes of the round, which it reads in two parts."""

    def read() -> Iterator[PromptGroups]:
        yield from (part(groups, 0, 2), part(groups, 2, len(LENGTHS)))

    found = {name: values for _, term in loss.terms for name, values in term.of_round(read).items()}
    return replace(groups, stored={**groups.stored, **found})


def naive_gae(
    rewards: list[list[float]], values: list[list[float]], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """Advantages as sums of discounted errors, token by token: no recursion."""
    advantages, returns = [], []
    for own_rewards, own_values in zip(rewards, values, strict=True):
        count = len(own_rewards)
        errors = [
            own_rewards[t] + (gamma * own_values[t + 1] if t + 1 < count else 0.0) - own_values[t] for t in range(count)
        ]
        for t in range(count):
            advantages.append(sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, count)))
            returns.append(advantages[-1] + own_values[t])
    return advantages, returns


def split(values: Tensor) -> list[list[float]]:
    return [part.tolist() for part in values.detach().double().split(LENGTHS)]


def test_gae_by_hand() -> None:
    """Deltas -0.3, 0.2 and 0.6 of the docstring; the other response has none of them."""
    rewards, values = torch.tensor([0.0, 0.0, 1.0, 2.0]), torch.tensor([0.5, 0.2, 0.4, 1.5])
    advantages, returns = gae(rewards, values, torch.tensor([3, 1]), 1.0, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([-0.05, 0.5, 0.6, 0.5]))
    torch.testing.assert_close(returns, torch.tensor([0.45, 0.7, 1.0, 2.0]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 0.0), (1.0, 1.0)])
def test_gae_equals_sums_of_discounted_errors(gamma: float, lam: float) -> None:
    groups = make_round()
    rewards, values = groups.token_rewards(), groups.stored["old_values"]
    advantages, returns = gae(rewards, values, groups.lengths, gamma, lam)
    wanted = naive_gae(split(rewards), split(values), gamma, lam)
    np.testing.assert_allclose(advantages, wanted[0], atol=1e-6)
    np.testing.assert_allclose(returns, wanted[1], atol=1e-6)
    if lam == 1:  # the rewards from the token on, whatever the values
        rest = [sum(own[t:]) for own in split(rewards) for t in range(len(own))]
        np.testing.assert_allclose(returns, rest, atol=1e-6)


def test_value_loss_by_hand() -> None:
    """0.5 * 0.3**2 = 0.045 with the value limited to 0.7, and 0.5 * 0.4**2 = 0.08 within the limit."""
    values = torch.tensor([0.9, 0.6], requires_grad=True)
    losses = clipped_value_loss(values, torch.tensor([0.5, 0.5]), torch.tensor([1.0, 1.0]), 0.2)
    torch.testing.assert_close(losses, torch.tensor([0.045, 0.08]))
    losses.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, -0.4]))  # a low value is to rise
    plain = clipped_value_loss(values, torch.tensor([0.5, 0.5]), torch.tensor([1.0, 1.0]), None)
    torch.testing.assert_close(plain, torch.tensor([0.005, 0.08]))


def test_advantages_are_whitened_over_the_whole_round() -> None:
    groups = make_round()
    raw, _ = naive_gae(split(groups.token_rewards()), split(groups.stored["old_values"]), 1.0, 0.95)
    white = prepare(PPOLoss(), groups).stored["advantages"]
    np.testing.assert_allclose(white, (raw - np.mean(raw)) / np.std(raw, ddof=1), atol=1e-5)
    plain = prepare(PPOLoss(whiten_advantages=False), groups).stored["advantages"]
    np.testing.assert_allclose(plain, raw, atol=1e-6)


def test_whitened_rewards_keep_their_mean() -> None:
    groups = make_round()
    rewards = groups.token_rewards().double().numpy()
    white = (rewards - rewards.mean()) / rewards.std(ddof=1) + rewards.mean()
    np.testing.assert_allclose(whiten(groups.token_rewards(), shift_mean=False), white, atol=1e-6)
    _, wanted = naive_gae(split(torch.tensor(white)), split(groups.stored["old_values"]), 1.0, 0.95)
    np.testing.assert_allclose(prepare(PPOLoss(whiten_rewards=True), groups).stored["returns"], wanted, atol=1e-6)


def padded(values: Tensor) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(values.split(LENGTHS), batch_first=True)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    mean = masked_mean(values, mask)
    count = mask.sum()
    variance = masked_mean((values - mean) ** 2, mask) * count / (count - 1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else whitened + mean


def trl_ppo(groups: PromptGroups, scores: Tensor) -> Tensor:
    """The loss of TRL's PPO over one update, with the score at the last token, on rows of equal length."""
    mask = padded(torch.ones(sum(LENGTHS))).double()
    logps, values = padded(groups.token_logps).double(), padded(groups.stored["values"]).double()
    old, reference, old_values = (
        padded(groups.stored[name]).double() for name in ("old_token_logps", "reference_token_logps", "old_values")
    )
    rewards = -0.05 * (old - reference)
    rewards[torch.arange(len(LENGTHS)), groups.lengths - 1] += scores.double()
    rewards = masked_whiten(rewards, mask, shift_mean=False) * mask
    last, reversed_advantages = torch.zeros(len(LENGTHS)).double(), []
    for t in reversed(range(LONGEST)):
        following = old_values[:, t + 1] if t < LONGEST - 1 else 0.0
        delta = rewards[:, t] + 1.0 * following - old_values[:, t]
        last = delta + 1.0 * 0.95 * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    returns = advantages + old_values
    advantages = masked_whiten(advantages, mask) * mask
    limited = torch.clamp(values, old_values - 0.2, old_values + 0.2)
    value_loss = 0.5 * masked_mean(torch.max((values - returns) ** 2, (limited - returns) ** 2), mask)
    ratio = torch.exp(logps - old)
    policy_loss = masked_mean(torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 0.8, 1.2)), mask)
    return policy_loss + 0.1 * value_loss


def update(loss: PolicyLoss, groups: PromptGroups, borders: list[int]) -> float:
    """Loss of an update in micro-batches that end at `borders`; leaves its gradient at the leaves of `groups`."""
    total, start = 0.0, 0
    elements = sum(LENGTHS)
    for end in borders:
        batch = part(groups, start, end)
        factors = [sum(LENGTHS[start:end]) / elements] * len(loss.terms)
        value = sum_of_means(loss, term_losses(loss, batch), factors, batch)
        value.backward(retain_graph=True)
        total += value.item()
        start = end
    return total


@pytest.mark.parametrize("borders", [[6], [1, 2, 6], [1, 2, 3, 4, 5, 6]])
def test_an_update_equals_trls_formulas(borders: list[int]) -> None:
    """Loss, and gradients of log-probs and values, however the update is divided."""
    loss, naive = PPOLoss(whiten_rewards=True), make_round()
    scores = naive.rewards + 0.05 * (naive.stored["old_logps"] - naive.stored["reference_logps"])
    wanted = trl_ppo(naive, scores)
    wanted.backward()
    groups = make_round()
    assert update(loss, prepare(loss, groups), borders) == pytest.approx(wanted.item(), rel=1e-5)
    for ours, theirs in ((groups.token_logps, naive.token_logps), (groups.stored["values"], naive.stored["values"])):
        assert theirs.grad is not None
        assert theirs.grad.norm() > 1e-3
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)


def test_truncated_responses_can_train_the_critic_alone() -> None:
    groups, loss = make_round(), PPOLoss(truncated="mask")
    policy, values = (losses.sum() for losses in term_losses(loss, prepare(loss, groups)))
    (policy + values).backward()
    truncated = torch.repeat_interleave(~groups.finished, groups.lengths)
    assert groups.token_logps.grad is not None
    assert groups.stored["values"].grad is not None
    assert (groups.token_logps.grad[truncated] == 0).all()
    assert (groups.token_logps.grad[~truncated] != 0).any()
    assert (groups.stored["values"].grad[truncated] != 0).any()


def test_metrics_of_the_critic() -> None:
    """Over two micro-batches, from means: the explained variance is that of NumPy over the whole update."""
    loss = PPOLoss()
    groups = prepare(loss, make_round())
    batches = [part(groups, 0, 3), part(groups, 3, 6)]
    logged = [{**loss.metrics(batch)} for batch in batches]
    means = {
        f"train/{name}": torch.cat([metrics[name].float() for metrics in logged]).double().mean().item()
        for name in logged[0]
    }
    found = summarised(loss, means, "train")
    assert set(found) == {f"train/{name}" for name in loss.metric_names}
    values, old, returns = (
        groups.stored[name].detach().double().numpy() for name in ("values", "old_values", "returns")
    )
    assert found["train/value_explained_variance"] == pytest.approx(1 - np.var(returns - values) / np.var(returns))
    assert found["train/value_mean"] == pytest.approx(values.mean(), rel=1e-4)
    assert found["train/return_mean"] == pytest.approx(returns.mean(), rel=1e-4)
    limited = np.clip(values, old - 0.2, old + 0.2)
    share = ((limited - returns) ** 2 > (values - returns) ** 2).mean()
    assert 0 < share < 1
    assert found["train/value_clip"] == pytest.approx(share)


def test_the_explained_variance_of_equal_returns_is_zero() -> None:
    means = {"return_mean": 1.0, "return_square": 1.0, "value_error": 0.5, "value_error_square": 0.5, "value_mean": 0.5}
    assert ValueLoss().summarise(means)["value_explained_variance"] == 0.0


def test_one_response_a_prompt_is_enough() -> None:
    assert PPOLoss().needs_responses == 1
    assert "groups_without_variance" not in PPOLoss().metric_names


def test_ppo_needs_a_critic_and_the_log_probs_of_tokens() -> None:
    needs = check_needs(PPOLoss(), 0.05, ("old_values",))
    assert {"old_values", "old_token_logps", "reference_token_logps", "rewards"} <= needs
    with pytest.raises(InputError, match=r"needs old_values\..*set --model rlhf_pl\.PPOModule"):
        check_needs(PPOLoss(), 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.0}, "`model.loss.gamma` must be above 0 and at most 1, got 0.0"),
        ({"lam": 1.1}, "`model.loss.lam` must be from 0 to 1, got 1.1"),
        ({"vf_coef": 0.0}, "`model.loss.vf_coef` must be positive and finite, got 0.0"),
        ({"value_clip": 0.0}, "`model.loss.value_clip` must be positive and finite, got 0.0"),
        ({"value_clip": math.inf}, "`model.loss.value_clip` must be positive and finite, got inf"),
        ({"clip_low": -0.1}, "`model.loss.clip_low` must be 0 or more and finite, got -0.1"),
        ({"aggregation": "constant"}, "give the number of tokens that sums are divided by"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PPOLoss(**options)  # type: ignore[arg-type]


def test_settings_name_every_option() -> None:
    """A change of any option is a change of the settings that a round was trained with."""
    from rlhf_pl.utils.fingerprints import describe

    def settings(**options: object) -> list[str]:
        return [f"{weight} {describe(term)}" for weight, term in PPOLoss(**options).terms]  # type: ignore[arg-type]

    changes: list[dict[str, object]] = [
        {"gamma": 0.9},
        {"lam": 0.5},
        {"clip_low": 0.1},
        {"clip_high": 0.1},
        {"value_clip": None},
        {"vf_coef": 0.5},
        {"whiten_rewards": True},
        {"whiten_advantages": False},
        {"aggregation": "response"},
        {"truncated": "mask"},
        {"kl": rlhf_pl.KLTerm()},
        {"correction": rlhf_pl.ImportanceCorrection()},
    ]
    assert all(settings(**change) != settings() for change in changes)
    assert isinstance(PPOLoss().terms[0][1], PPOPolicyLoss)
