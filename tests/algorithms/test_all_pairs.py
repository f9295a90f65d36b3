"""Several pairs of a prompt: each response is computed once, and a prompt counts once."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_pl.store.round_store import RoundStore
from tests.algorithms.trained_round import Group, assert_same_training, logged_losses, naive_updates

ETA = 1.5
Logps = dict[int, Tensor]


def rebel(new: Logps, old: Logps, groups: list[Group], selector: str) -> Tensor:
    """The mean over prompts of the mean over their pairs, pair by pair."""
    prompts = []
    for group in groups:
        rewards = [row["reward"] for row in group]
        ratios = [(new[id(row)] - old[id(row)]).sum() for row in group]
        if max(rewards) == min(rewards):
            continue
        pairs = list(combinations(range(len(group)), 2))
        if selector == "BestVsRest":
            best = rewards.index(max(rewards))
            pairs = [(best, i) for i in range(len(group)) if rewards[i] < rewards[best]]
        errors = [ratios[i] - ratios[j] - ETA * (rewards[i] - rewards[j]) for i, j in pairs]
        prompts.append(torch.stack(errors).square().mean())
    return torch.stack(prompts).mean()


@pytest.mark.parametrize("selector", ["AllPairs", "BestVsRest"])
@pytest.mark.parametrize("tokens", ["null", "150"])
def test_rebel_on_several_pairs_of_a_prompt(selector: str, tokens: str, fit: Callable[..., int], llama: Path) -> None:
    arguments = ("--model.loss.eta", str(ETA), "--rollout.selector", selector, "--data.max_tokens_per_batch", tokens)
    assert fit(*arguments, "--rollout.sampling.num_responses", "4") == 0
    losses, start, wanted = naive_updates(llama, 2, lambda *logps: rebel(*logps, selector))
    assert logged_losses() == pytest.approx(losses, rel=1e-4)
    assert_same_training(start, wanted)
    stored = RoundStore("run").round(0)
    assert len(stored.read("logps")) == stored.info("pairs")["responses"] <= 28  # each response once


def test_the_first_gradient_of_all_pairs_is_that_of_rloo_times_4_eta(fit: Callable[..., int], llama: Path) -> None:
    """RLOO: the mean over responses of -A log pi, with A = n / (n - 1) (r - mean r)."""
    arguments = ("--model.loss.eta", str(ETA), "--rollout.selector", "AllPairs", "--data.passes", "1")
    assert fit(*arguments, "--rollout.sampling.num_responses", "4") == 0

    def rloo(new: Logps, old: Logps, groups: list[Group]) -> Tensor:
        terms = []
        for group in groups:
            mean = sum(row["reward"] for row in group) / len(group)
            if len({row["reward"] for row in group}) > 1:
                terms += [-4 / 3 * (row["reward"] - mean) * new[id(row)].sum() for row in group]
        return 4 * ETA * torch.stack(terms).mean()

    _, start, wanted = naive_updates(llama, 1, rloo)
    assert_same_training(start, wanted)


def test_a_sum_of_losses_has_a_mean_for_each(fit: Callable[..., int], llama: Path) -> None:
    """REBEL over pairs, plus 0.3 times the negative log-likelihood over the tokens of the pairs' responses."""
    Path("tokens.py").write_text(
        "from rlhf_pl import PolicyLoss\n\n\nclass NLL(PolicyLoss):\n    needs, per = set(), 'token'\n\n"
        "    def losses(self, groups):\n        return -groups.token_logps\n"
    )
    Path("sum.yaml").write_text(
        "model: {loss: {class_path: rlhf_pl.SumOfLosses, init_args: {weights: [1.0, 0.3], losses: ["
        f"{{class_path: rlhf_pl.RebelLoss, init_args: {{eta: {ETA}}}}}, {{class_path: tokens.NLL}}]}}}}}}\n"
    )
    assert fit("--config", "sum.yaml") == 0

    def mixture(new: Logps, old: Logps, groups: list[Group]) -> Tensor:
        errors, tokens = [], []
        for group in groups:
            rewards = [row["reward"] for row in group]
            best, worst = (group[rewards.index(f(rewards))] for f in (max, min))
            if best["reward"] > worst["reward"]:
                ratios = [(new[id(row)] - old[id(row)]).sum() for row in (best, worst)]
                errors.append(ratios[0] - ratios[1] - ETA * (best["reward"] - worst["reward"]))
                tokens += [new[id(best)], new[id(worst)]]
        return torch.stack(errors).square().mean() - 0.3 * torch.cat(tokens).mean()

    losses, start, wanted = naive_updates(llama, 2, mixture)
    assert logged_losses() == pytest.approx(losses, rel=1e-4)
    assert_same_training(start, wanted)


def test_all_pairs_in_closed_form() -> None:
    """With d = (0, 1, 3): the squares of the differences are 1, 9, 4; n times the squares around 4/3 are 14, too."""
    d = np.array([0.0, 1.0, 3.0])
    pairs = [(d[i] - d[j]) ** 2 for i, j in combinations(range(3), 2)]
    assert sum(pairs) == pytest.approx(3 * ((d - d.mean()) ** 2).sum()) == pytest.approx(14)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[(0, 9)]", "returned the pair (0, 9) for prompt_id 'p0', which has 3 responses. Return two different"),
        ("[(1, 1)]", "Return two different indices from 0 to 2"),
        ("[(rewards.index(min(rewards)), rewards.index(max(rewards)))]", "whose chosen response has the lower reward"),
        ("[(rewards.index(max(rewards)), rewards.index(min(rewards)))] * 2", "returned a pair twice"),
    ],
)
def test_a_selector_that_returns_no_pairs_of_responses_is_refused(
    returned: str, message: str, fit: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    module = f"users_selector_{len(returned)}"  # a name of its own: imported modules stay
    Path(f"{module}.py").write_text(
        "from rlhf_pl import PairSelector\n\n\nclass Wrong(PairSelector):\n"
        f"    def __call__(self, rewards, lengths, finished, seed):\n        return {returned}\n"
    )
    assert fit("--rollout.selector", f"{module}.Wrong") == 1
    assert message in capsys.readouterr().err
