"""Run directories of configs that name none."""

import re
from pathlib import Path

from jsonargparse import Namespace

from rlhf_pl.cli.fit import RlhfCLI
from rlhf_pl.cli.run_names import describe_run

SHORTEST = ("--model.policy", "org/Small-1B", "--data.prompts", "data/sums.jsonl", "--rollout.reward", "r.py:right")


class Parsed(RlhfCLI):
    """Reads a config and builds nothing."""

    def instantiate_classes(self) -> None:
        self.trainer = None

    def _run_subcommand(self, subcommand: str) -> None:
        """Do nothing."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict:
        return {}


def run_dir(*arguments: str) -> str:
    config: Namespace = Parsed(["fit", *SHORTEST, *arguments]).config
    return config.fit.trainer.default_root_dir


def test_experiments_have_directories_of_their_own() -> None:
    base = run_dir()
    assert re.fullmatch(r"runs/Small-1B-right-[0-9a-f]{6}", base)
    others = [
        run_dir("--rollout.reward", "r.py:short"),
        run_dir("--data.prompts", "data/products.jsonl"),
        run_dir("--model.policy", "other/Small-1B"),
        run_dir("--model.loss", "IPOLoss"),
        run_dir("--model.lora", "LoRA"),
        run_dir("--rounds_from", "runs/a"),
    ]
    assert len({base, *others}) == 7


def test_settings_change_within_one_run() -> None:
    changed = ("--model.optimizer.lr", "1e-5", "--model.loss.eta", "2", "--seed_everything", "3")
    assert run_dir(*changed, "--trainer.max_epochs", "9", "--rollout.sampling.temperature", "0.7") == run_dir()
    assert run_dir("--trainer.default_root_dir", "runs/mine") == "runs/mine"


def test_new_run_is_said(tmp_path: Path) -> None:
    assert describe_run(str(tmp_path), 3, "round") == f"Run directory {tmp_path}: new."
    (tmp_path / "rounds").mkdir()
    (tmp_path / "rounds" / "file").write_bytes(bytes(2048))
    line = f"Goes on with {tmp_path}: 0 of 3 rounds trained; it holds 2.0 KiB (rounds 2.0 KiB)."
    assert describe_run(str(tmp_path), 3, "round") == line
