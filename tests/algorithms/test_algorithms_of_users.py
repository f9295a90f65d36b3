"""Users' losses on pairs, groups, responses and tokens, trained for a round by the real command."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf_pl.__main__ import main
from rlhf_pl.store.round_store import RoundStore

LR, TEMPERATURE = 0.002, 0.9
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


class Plain(PolicyLoss):
    """The mean negative log-prob: needs nothing."""

    needs = set()
    per = "response"

    def losses(self, groups):
        return -groups.logps
'''
CONFIG = f"""
model:
  optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: {LR}}}}}
  lr_scheduler: {{class_path: torch.optim.lr_scheduler.ConstantLR, init_args: {{factor: 1.0}}}}
data: {{max_prompt_tokens: 64, batch_size: 2, passes: 2}}
rollout:
  sampler: TransformersSampler
  sampling: {{num_responses: 3, max_response_tokens: 32, temperature: {TEMPERATURE}}}
trainer:
  max_epochs: 1
  accelerator: cpu
  accumulate_grad_batches: 4
  log_every_n_steps: 1
  default_root_dir: run
  logger: {{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: logs, name: csv, version: ""}}}}
"""
REWARD = "def score(response):\n    return len(set(response)) / 4 + sum(map(ord, response)) % 7 / 10\n"


@pytest.fixture
def command(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`rlhf-pl fit` with seven prompts, so that micro-batches differ in size; both passes are one update each."""
    rows = [{"prompt_id": f"p{i}", "prompt": f"What is {i} plus {i}?"} for i in range(7)]
    for name, text in (
        ("prompts.jsonl", "\n".join(map(json.dumps, rows))),
        ("users_reward.py", REWARD),
        ("users_losses.py", LOSSES),
        ("users.yaml", CONFIG),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(loss: str, *arguments: str) -> int:
        given = (
            "--model.policy",
            str(llama),
            "--data.prompts",
            "prompts.jsonl",
            "--model.loss",
            f"users_losses.{loss}",
        )
        reward = ("--rollout.reward", "users_reward.score")
        return main(["fit", "--config", "users.yaml", *given, *reward, *arguments])

    return run


Group = list[dict[str, Any]]


def stored_prompts() -> list[Group]:
    """The scored responses to each prompt, read from the files."""
    stored = RoundStore("run").round(0)
    groups: dict[str, Group] = {}
    rewards = stored.read("rewards")["reward"].to_pylist()
    for row, reward in zip(stored.read("responses").to_pylist(), rewards, strict=True):
        groups.setdefault(row["prompt_id"], []).append(row | {"reward": reward})
    return list(groups.values())


def token_logps(lm: Any, row: dict[str, Any]) -> Tensor:
    """Log-prob of each token of a response, from full logits."""
    prompt, response = row["prompt_tokens"], row["response_tokens"]
    table = (lm(input_ids=torch.tensor([prompt + response])).logits[0] / TEMPERATURE).log_softmax(-1)
    return torch.stack([table[len(prompt) + i - 1, token] for i, token in enumerate(response)])


def naive_loss(name: str, new: dict[int, Tensor], old: dict[int, Tensor], groups: list[Group]) -> Tensor:
    """The mean loss over the round, pair by pair and token by token."""
    terms: list[Tensor] = []
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
            if name == "ClippedTokens" and row["finished"]:
                for ratio in (new[id(row)] - old[id(row)]).exp():
                    terms.append(-torch.minimum(ratio * gain, ratio.clamp(0.9, 1.1) * gain))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("name", ["Logistic", "AllPairsRebel", "Reinforce", "ClippedTokens"])
def test_a_round_trains_like_the_naive_computation(name: str, command: Callable[..., int], llama: Path) -> None:
    """Two plain SGD updates over the whole round; the second is off-policy. Micro-batches of 2, 2, 2 and 1 groups."""
    from transformers import AutoModelForCausalLM

    assert command(name) == 0
    groups = stored_prompts()
    assert name != "ClippedTokens" or len({row["finished"] for group in groups for row in group}) == 2
    lm = AutoModelForCausalLM.from_pretrained(llama).eval()
    start = {n: p.detach().clone() for n, p in lm.named_parameters()}
    old: dict[int, Tensor] = {}
    losses = []
    for _ in range(2):
        new = {id(row): token_logps(lm, row) for group in groups for row in group}
        old = old or {key: value.detach() for key, value in new.items()}
        loss = naive_loss(name, new, old, groups)
        lm.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter -= LR * parameter.grad
    with Path("logs/csv/metrics.csv").open() as file:
        logged = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert logged == pytest.approx(losses, rel=1e-4, abs=1e-6)
    trained = load_file("run/model/model.safetensors")
    for key, parameter in lm.named_parameters():
        moved = parameter.detach() - start[key]
        assert moved.norm() > 1e-6
        assert (trained[key] - start[key] - moved).norm() < 1e-3 * moved.norm(), key


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
        ("ClippedTokens", ("--rollout.sampling.temperature", "1", "--rollout.old_logps", "sampler"), "of every token"),
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
    assert "Option 'eta' is not accepted" in capsys.readouterr().err
    assert not Path("run").exists()
