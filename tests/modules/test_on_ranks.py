"""Supervised fine-tuning, reward models and offline pairs on two processes give the model of one process."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import save_llama, save_reward_model
from tests.integration.test_kill_matrix import outcomes

STRATEGIES = ("ddp", "fsdp", "fsdp2")
KINDS = {
    "sft": "--model SFTModule --model.policy {model} --data SFTDataModule --data.conversations {rows} "
    "--data.val_conversations 7 --data.max_tokens 64",
    "reward": "--model RewardModelModule --model.backbone {model} --data PreferenceDataModule --data.preferences "
    "{rows} --data.val_preferences 7 --data.max_tokens 64",
    "offline": "--model.policy {model} --model.kl_coef 0.01 --data OfflineDataModule --data.pairs {rows} "
    "--data.val_pairs 7 --data.max_prompt_tokens 64 --data.max_response_tokens 64 --model.loss SumOfLosses "
    "--model.loss.losses+ RebelLoss --model.loss.losses+ ChosenNLL --model.loss.weights [1,0.5]",
}


@pytest.mark.slow
def test_every_module_trains_equally_on_shards_and_on_one_process(tmp_path: Path) -> None:
    """41 rows: the last update is short, and one rank has one row fewer than the other."""
    model = save_llama(tmp_path / "llama")
    rows = [
        {"prompt": f"What is {i}?", "response": f"It is {i}" + " and on" * (i % 5), "chosen": f"It is {i}",
         "rejected": "no " * (1 + i % 4), "chosen_reward": 1.0 + i / 50, "rejected_reward": 0.5}
        for i in range(41)
    ]  # fmt: skip
    names = {"sft": ("prompt", "response"), "reward": ("prompt", "chosen", "rejected"), "offline": tuple(rows[0])}
    runs = []
    for kind, options in KINDS.items():
        file = tmp_path / f"{kind}.jsonl"
        file.write_text("".join(json.dumps({n: row[n] for n in names[kind] if n != "response" or kind == "sft"}) + "\n"
                                for row in rows))  # fmt: skip
        for strategy in ("auto", *STRATEGIES):
            ranks = 1 if strategy == "auto" else 2
            spread = f"--trainer.devices {ranks} --trainer.strategy {strategy} "
            spread += f"--trainer.accumulate_grad_batches {4 // ranks}"
            arguments = f"{options.format(model=model, rows=file)} {spread}".split()
            runs.append({"dir": str(tmp_path / f"{kind}-{strategy}"), "ranks": ranks, "arguments": arguments})
    shared = "--model.optimizer.lr 1e-3 --data.batch_size 1 --trainer.accelerator cpu --trainer.max_epochs 1"
    plan = {"arguments": ["fit"]}
    for run in runs:
        run["arguments"] = [*run["arguments"], *shared.split()]
    for run, outcome in zip(runs, outcomes(tmp_path, plan, runs), strict=True):
        assert set(outcome["every"]) == {0}, Path(f"{run['dir']}.log").read_text()
    for kind in KINDS:
        line = _epoch(tmp_path / f"{kind}-auto.log")
        expected = load_file(tmp_path / f"{kind}-auto" / "model" / "model.safetensors")
        for strategy in STRATEGIES:
            found = load_file(tmp_path / f"{kind}-{strategy}" / "model" / "model.safetensors")
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, rtol=0, atol=5e-5)
            assert _epoch(tmp_path / f"{kind}-{strategy}.log").split("loss")[0] == line.split("loss")[0]


@pytest.mark.slow(minutes=1.5)
def test_ppo_trains_equally_on_shards_and_resumes_in_the_critics_warm_up(tmp_path: Path) -> None:
    """Three updates of seven prompts; runs are stopped after the first one, which trains the critic alone."""
    model, critic = save_llama(tmp_path / "llama"), save_reward_model(tmp_path / "reward")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"What is {i}?"}) + "\n" for i in range(7)))
    (tmp_path / "reward.py").write_text("def score(response):\n    return len(set(response)) / 4\n")
    shared = f"--model PPOModule --model.policy {model} --model.critic.model {critic} --model.critic.lr 0.01 "
    shared += "--model.critic.warmup_updates 1 --model.optimizer rlhf_pl.modules.optimizers.AdamW "
    shared += f"--model.optimizer.lr 3e-3 --data.prompts {tmp_path}/prompts.jsonl --data.max_prompt_tokens 64 "
    shared += f"--data.batch_size 1 --data.passes 3 --rollout.reward {tmp_path}/reward.py:score "
    shared += "--rollout.sampler TransformersSampler --rollout.sampling.max_response_tokens 16 --trainer.max_epochs 1 "
    shared += "--trainer.accelerator cpu --trainer.gradient_clip_val 1 --checkpoint.every_n_updates 1"
    runs = []
    for strategy in ("auto", *STRATEGIES):
        ranks = 1 if strategy == "auto" else 2
        spread = f"--trainer.devices {ranks} --trainer.strategy {strategy} "
        arguments = f"{shared} {spread} --trainer.accumulate_grad_batches {8 // ranks}".split()
        whole, parts = str(tmp_path / f"{strategy}-whole"), str(tmp_path / f"{strategy}-parts")
        runs.append({"dir": whole, "ranks": ranks, "arguments": arguments})
        if ranks > 1:
            runs.append({"dir": parts, "ranks": ranks, "arguments": [*arguments, "--trainer.max_steps", "1"]})
            runs.append({"dir": parts, "ranks": ranks, "arguments": arguments})
    for run, outcome in zip(runs, outcomes(tmp_path, {"arguments": ["fit"]}, runs), strict=True):
        assert set(outcome["every"]) == {0}, Path(f"{run['dir']}.log").read_text()
    for file in ("model/model.safetensors", "model/critic/model.safetensors"):
        expected = load_file(tmp_path / "auto-whole" / file)
        for strategy in STRATEGIES:
            whole, parts = (load_file(tmp_path / f"{strategy}-{kind}" / file) for kind in ("whole", "parts"))
            for name, tensor in expected.items():
                torch.testing.assert_close(whole[name], tensor, rtol=0, atol=5e-5)
                assert torch.equal(parts[name], whole[name]), (strategy, name)


def _epoch(log: Path) -> str:
    return next(line for line in log.read_text().splitlines() if line.startswith("epoch 1:"))


LOSS = """
import math, os
from rlhf_pl import PairwiseLoss
class InfiniteOnOneRank(PairwiseLoss):
    calls = 0
    def __call__(self, chosen, rejected, margins):
        losses = (chosen - rejected - margins) ** 2
        if losses.requires_grad and os.environ.get("RANK") == "1":
            self.calls += 1
            if self.calls == 3:
                return losses + math.inf  # whose gradient is finite: no other rank sees it
        return losses
"""


@pytest.mark.slow
def test_all_ranks_end_if_one_has_diverged(tmp_path: Path) -> None:
    """Found in one rank's loss in the middle of an update, and in the weights after a single update."""
    model = save_llama(tmp_path / "llama")
    row = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No.", "chosen_reward": 1.0, "rejected_reward": 0.0}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"prompt": f"Is {i}?"}) + "\n" for i in range(16)))
    (tmp_path / "strange.py").write_text(LOSS)
    kinds = {  # a loss is whole on its rank under any strategy; weights are looked at whole or in shards
        "loss": ("ddp", "--model.loss strange.InfiniteOnOneRank", "the loss is not finite"),
        "weights": (
            *("ddp fsdp fsdp2", "--model.optimizer.lr 1e6 --trainer.max_steps 1"),
            "holds numbers that are not finite, or beyond",
        ),
    }
    shared = f"--model.policy {model} --data OfflineDataModule --data.pairs {tmp_path}/rows.jsonl --data.batch_size 1 "
    shared += "--trainer.accelerator cpu --trainer.max_epochs 1 --trainer.accumulate_grad_batches 2 --trainer.devices 2"
    runs = [
        {
            "dir": str(tmp_path / f"{kind}-{strategy}"),
            "ranks": 2,
            "arguments": [*shared.split(), *options.split(), "--trainer.strategy", strategy],
        }
        for kind, (strategies, options, _) in kinds.items()
        for strategy in strategies.split()
    ]
    for run, outcome in zip(runs, outcomes(tmp_path, {"arguments": ["fit"]}, runs), strict=True):
        log = Path(f"{run['dir']}.log").read_text()
        assert set(outcome["every"]) == {1}, log
        assert log.count("error: ") == 1, log
        assert kinds[Path(str(run["dir"])).name.partition("-")[0]][2] in log
        assert not (Path(str(run["dir"])) / "model").exists()
        assert not list(Path(str(run["dir"])).rglob("*.ckpt"))
