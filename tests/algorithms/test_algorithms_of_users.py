"""Users' losses on pairs, groups, responses and tokens, trained for a round by the real command."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_pl.store.round_store import RoundStore
from tests.algorithms.trained_round import Group, assert_same_training, logged_losses, naive_updates, stored_prompts

LOSSES = '''
import torch
from rlhf_pl import PairwiseLoss, PolicyLoss


class Logistic(PairwiseLoss):
    """-log sigmoid of the log-ratio margin: DPO with pi_old as its reference."""

    def __init__(self, beta: float = 0.3):
        self.beta = beta

    def __call__(self, chosen_logratios, rejected_logratios, reward_margins):
        return -torch.nn.functional.logsigmoid(self.beta * (chosen_logratios - rejected_logratios))


class AllPairsRebel(PolicyLoss):
    """REBEL on all pairs of a prompt: their mean squared residual, without a loop over pairs."""

    needs = {"rewards", "old_logps"}
    per = "group"

    def __init__(self, eta: float = 1.5):
        self.eta = eta

    def losses(self, groups):
        residuals = groups.logps - groups.old_logps - self.eta * groups.rewards
        spread = groups.sum_per_group((residuals - groups.group_means(residuals)) ** 2)
        return 2 * spread / (groups.sizes - 1)


class Reinforce(PolicyLoss):
    """REINFORCE with the group's mean reward as the baseline, over the mean log-prob of a response."""

    needs = {"rewards"}
    per = "response"

    def losses(self, groups):
        return -(groups.rewards - groups.group_means(groups.rewards)) * groups.logps / groups.lengths


class ClippedTokens(PolicyLoss):
    """PPO's clipped objective of every token of a finished response, with the group's mean as the baseline."""

    needs = {"rewards", "old_token_logps"}
    per = "token"

    def counts(self, lengths, finished):
        return lengths * finished

    def losses(self, groups):
        advantages = groups.per_token(groups.rewards - groups.group_means(groups.rewards))
        ratios = (groups.token_logps - groups.old_token_logps).exp()
        least = torch.minimum(ratios * advantages, ratios.clamp(0.9, 1.1) * advantages)
        return -least[groups.per_token(groups.finished)]


class NormalisedOverTheRound(PolicyLoss):
    """REINFORCE with rewards that are normalised over the whole round."""

    needs = {"rewards"}
    per = "response"
    round_values = ("advantages",)

    def of_round(self, read):
        rewards = torch.cat([groups.rewards for groups in read()])
        return {"advantages": (rewards - rewards.mean()) / rewards.std()}

    def losses(self, groups):
        return -groups.stored["advantages"] * groups.logps / groups.lengths


class Plain(PolicyLoss):
    """The mean negative log-prob: needs nothing."""

    needs = set()
    per = "response"

    def losses(self, groups):
        return -groups.logps
'''


@pytest.fixture
def command(fit: Callable[..., int]) -> Callable[..., int]:
    """The command with one of the losses."""
    Path("users_losses.py").write_text(LOSSES)
    return lambda loss, *arguments: fit("--model.loss", f"users_losses.{loss}", *arguments)


def naive_loss(name: str, new: dict[int, Tensor], old: dict[int, Tensor], groups: list[Group]) -> Tensor:
    """The mean loss over the round, pair by pair and token by token."""
    terms: list[Tensor] = []
    everything = torch.tensor([row["reward"] for group in groups for row in group])
    for group in groups:
        rewards = [row["reward"] for row in group]
        mean = sum(rewards) / len(rewards)
        ratios = [(new[id(row)] - old[id(row)]).sum() for row in group]
        if name == "Logistic" and max(rewards) > min(rewards):
            best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
            terms.append((1 + (-0.3 * (ratios[best] - ratios[worst])).exp()).log())
        if name == "AllPairsRebel":
            pairs = [(i, j) for i in range(len(group)) for j in range(i)]
            errors = [ratios[i] - ratios[j] - 1.5 * (rewards[i] - rewards[j]) for i, j in pairs]
            terms.append(sum(e * e for e in errors) / len(pairs))  # type: ignore[arg-type]
        for row in group:
            gain = row["reward"] - mean
            if name == "Reinforce":
                terms.append(-gain * new[id(row)].sum() / len(row["response_tokens"]))
            if name == "NormalisedOverTheRound":
                advantage = (row["reward"] - everything.mean()) / everything.std()
                terms.append(-advantage * new[id(row)].sum() / len(row["response_tokens"]))
            if name == "ClippedTokens" and row["finished"]:
                for ratio in (new[id(row)] - old[id(row)]).exp():
                    terms.append(-torch.minimum(ratio * gain, ratio.clamp(0.9, 1.1) * gain))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("name", ["Logistic", "AllPairsRebel", "Reinforce", "NormalisedOverTheRound", "ClippedTokens"])
def test_a_round_trains_like_the_naive_computation(name: str, command: Callable[..., int], llama: Path) -> None:
    """Two plain SGD updates over the whole round; the second is off-policy. Micro-batches of 2, 2, 2 and 1 groups."""
    assert command(name) == 0
    assert name != "ClippedTokens" or len({row["finished"] for group in stored_prompts() for row in group}) == 2
    losses, start, wanted = naive_updates(llama, 2, partial(naive_loss, name))
    assert logged_losses() == pytest.approx(losses, rel=1e-4, abs=1e-6)
    assert_same_training(start, wanted)


def test_only_the_log_probs_that_a_loss_needs_are_computed(command: Callable[..., int]) -> None:
    assert command("Plain") == 0
    stored = RoundStore("run").round(0)
    assert stored.read("logps").column_names == ["prompt_id", "response_index"]
    assert len(stored.read("logps")) == 21  # 7 prompts, 3 responses each
    # another loss on the same groups: only the log-probs are computed again
    before = {stage: [file.name for file in stored.shards(stage).values()] for stage in ("responses", "pairs")}
    assert command("ClippedTokens", "--trainer.default_root_dir", "run") == 0
    table = stored.read("logps")
    assert {stage: [file.name for file in stored.shards(stage).values()] for stage in before} == before
    sums = [sum(values) for values in table["old_token_logps"].to_pylist()]
    assert table["old_logp"].to_pylist() == pytest.approx(sums, rel=1e-6)  # sums of float32


@pytest.mark.parametrize(
    ("loss", "arguments", "message"),
    [
        ("AllPairsRebel", ("--rollout.selector", "RandomPair"), "no pairs are selected"),
        ("Plain", ("--model.kl_coef", "0.1"), "reads no rewards"),
        ("Plain", ("--rollout.shaping.normalize", "round"), "reads no rewards"),
        ("Plain", ("--model.reference", "x"), "it would have no effect"),
        ("Plain", ("--rollout.sampling.temperature", "1", "--rollout.old_logps", "sampler"), "uses no log-probs"),
    ],
)
def test_options_without_effect_on_a_loss_are_refused(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str], loss: str, arguments: tuple[str, ...], message: str
) -> None:
    assert command(loss, *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error: ") == 1
    assert not Path("run").exists()


def test_an_argument_that_a_loss_does_not_have_is_refused(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command("Reinforce", "--model.loss.eta", "2")
    assert "Reinforce has no option 'eta'" in capsys.readouterr().err
    assert not Path("run").exists()
