"""A round of seven prompts that the real command trains on, and its naive computation from full logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_pl.store.round_store import RoundStore

LR, TEMPERATURE = 0.002, 0.9
CONFIG = f"""
model:
  optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: {LR}}}}}
  lr_scheduler: {{class_path: torch.optim.lr_scheduler.ConstantLR, init_args: {{factor: 1.0}}}}
data: {{max_prompt_tokens: 64, val_prompts: 0, batch_size: 2, passes: 2}}
rollout:
  sampler: TransformersSampler
  sampling: {{num_responses: 3, max_response_tokens: 32, temperature: {TEMPERATURE}}}
trainer:
  max_epochs: 1
  accelerator: cpu
  precision: 32-true
  accumulate_grad_batches: 4
  log_every_n_steps: 1
  default_root_dir: run
  logger: {{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: logs, name: csv, version: ""}}}}
"""
REWARD = "def score(response):\n    return len(set(response)) / 4 + sum(map(ord, response)) % 7 / 10\n"


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


def naive_updates(
    llama: Path, count: int, loss: Callable[[dict[int, Tensor], dict[int, Tensor], list[Group]], Tensor]
) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Plain SGD updates over the whole round.

    Args:
        llama: The initial policy.
        count: Number of updates; all but the first are off-policy.
        loss: (log-probs of each response's tokens by `id`, those of pi_old, groups) -> the loss.

    Returns:
        (loss before each update, weights before, weights after).
    """
    from transformers import AutoModelForCausalLM

    groups = stored_prompts()
    lm = AutoModelForCausalLM.from_pretrained(llama).eval()
    start = {n: p.detach().clone() for n, p in lm.named_parameters()}
    old: dict[int, Tensor] = {}
    losses = []
    for _ in range(count):
        new = {id(row): token_logps(lm, row) for group in groups for row in group}
        old = old or {key: value.detach() for key, value in new.items()}
        value = loss(new, old, groups)
        lm.zero_grad()
        value.backward()
        losses.append(value.item())
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter -= LR * parameter.grad
    return losses, start, {n: p.detach() for n, p in lm.named_parameters()}


def assert_same_training(
    start: dict[str, Tensor], wanted: dict[str, Tensor], folder: str = "run", model: str = "model"
) -> None:
    """The exported model of a run has moved from `start` to `wanted`."""
    from safetensors.torch import load_file

    trained = load_file(f"{folder}/{model}/model.safetensors")
    for key, after in wanted.items():
        moved = after - start[key]
        assert moved.norm() > 1e-6
        assert (trained[key] - start[key] - moved).norm() < 1e-3 * moved.norm(), key


def logged_losses() -> list[float]:
    """`train/loss` of each update."""
    return logged("train/loss")


def logged(name: str) -> list[float]:
    """A metric of each update, where it is logged."""
    import csv

    with Path("logs/csv/metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]
