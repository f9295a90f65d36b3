"""The command line, called as by users."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rlhf_pl.__main__ import main
from rlhf_pl.callbacks import run_lifecycle

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
REWARD = "def score(response):\n    return len(set(response))\n\n\ndef nan(response):\n    return float('nan')\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with prompts and a reward."""
    rows = [{"prompt_id": f"p{i}", "prompt": f"What is {i} plus {i}?"} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "cli_reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def shortest(llama: Path) -> list[str]:
    """The required options, and options for a fast test."""
    return [
        *(
            "fit",
            "--model.policy",
            str(llama),
            "--data.prompts",
            "prompts.jsonl",
            "--rollout.reward",
            "cli_reward.score",
        ),
        *("--rollout.sampler", "TransformersSampler", "--rollout.sampling.max_response_tokens", "6"),
        *("--data.max_prompt_tokens", "64", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"),
        *("--trainer.default_root_dir", "runs/cli"),
    ]


def printed_config(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> dict:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_fit_writes_a_complete_run_directory(
    folder: Path, shortest: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*shortest, "--data.val_prompts", "3", "--trainer.max_epochs", "2", "--model.optimizer.lr", "1e-3"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for text in ("Round 2 of 2", "round 2: reward", "on the held-out prompts", "before: reward", "Next:", "tokens/s"):
        assert text in out
    run = folder / "runs" / "cli"
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-3
    assert resolved["rollout"]["sampling"]["max_response_tokens"] == 6
    for name in ("rounds/0001/manifest.json", "model/model.safetensors", "checkpoints/last.ckpt", "samples.html"):
        assert (run / name).exists(), name
    assert list((run / "tensorboard").glob("events*"))
    torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    # the same command again finds the run finished and repeats nothing
    before = (run / "rounds" / "0001" / "manifest.json").read_text()
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "Resuming from" in out
    assert "This run is finished: its 2 rounds were trained before, and nothing is left to do.\nHeld-out reward " in out
    assert "the same command with --trainer.max_epochs 4" in out
    assert not any(text in out for text in ("How to read", "before: reward", "Rounds ("))
    assert (run / "rounds" / "0001" / "manifest.json").read_text() == before
    assert not (run / "rounds" / "0002").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.prompts", "missing.jsonl"], "no file 'missing.jsonl'"),
        (["--data.columns.prompt", "question"], "no column `question`"),
        (["--rollout.reward", "cli_reward.grade"], "has no 'grade'"),
        (["--rollout.reward", "nowhere.score"], "no module 'nowhere'"),
        (["--rollout.reward", "cli_reward.nan"], "Every score must be a finite number"),
        (["--data.max_prompt_tokens", "1000"], "is over the context"),
        (["--data.max_prompt_tokens", "2"], "is left to train on"),
        (["--model.policy", "no/such/model"], "`model.policy`: no folder 'no/such/model'"),
        (["--model.loss.eta", "-1"], "eta` must be positive"),
        (["--rollout.sampling.temperature", "0"], "would be the same"),
        (["--trainer.precision", "bf16-true"], "32-true"),
        (
            [
                *("--rollout.reward", "JudgePairReward", "--rollout.reward.url", "http://127.0.0.1:9"),
                *("--rollout.reward.model", "m", "--data.val_prompts", "2", "--rollout.val_num_responses", "1"),
            ],
            "`rollout.val_num_responses` must be 2 or more",
        ),
    ],
)
def test_user_errors_end_with_one_message(
    folder: Path, shortest: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([*shortest, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("error: ") == 1
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not (folder / "runs").exists()


def test_a_run_names_its_directory_first_and_a_refused_one_prints_nothing_but_its_error(
    folder: Path, shortest: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = shortest.index("--rollout.reward")
    assert main(shortest[:reward] + shortest[reward + 2 :]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: `rollout.reward` is missing, and runs/cli holds no prepared rounds. Give a ")
    monkeypatch.setattr(run_lifecycle, "choose_threads", lambda *_: (1, "Other processes keep cores busy."))
    assert main(shortest) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Run directory runs/cli: new."  # before the rate that was chosen, and the threads
    assert "Other processes keep cores busy." in lines[1:4]
    assert any(line.startswith("Learning rate: ") for line in lines)
    assert main([*shortest, "--trainer.max_epochs", "2", "--rollout.sampling.num_responses", "5"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "with other settings" in shown.err


def test_a_run_that_has_ended_at_max_steps_says_so_when_repeated(
    folder: Path, shortest: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """At an update of its second round."""
    arguments = [*shortest, "--trainer.max_epochs", "3", "--data.batch_size", "2", "--trainer.max_steps"]
    assert main([*arguments, "5"]) == 0
    assert "How to read" in capsys.readouterr().out
    assert main([*arguments, "5"]) == 0
    out = capsys.readouterr().out
    assert "Stopped inside round 2 of 3, at update 5. `trainer.max_steps` is reached" in out
    assert "This run had ended at `trainer.max_steps`, and nothing is left to do." in out
    assert "the same command with a higher --trainer.max_steps (now 5)" in out
    assert not any(text in out for text in ("How to read", "Prompts: ", "before: reward", "is finished"))
    assert main([*arguments, "6"]) == 0
    assert "How to read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.polcy", "x"], "polcy"),
        (["--data.batch_size", "many"], "batch_size"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--rollout.sampler", "NoSuchSampler"], "NoSuchSampler"),
        (["--nonsense", "1"], "nonsense"),
    ],
)
def test_unknown_options_end_with_a_short_error(
    folder: Path, shortest: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*shortest, *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) < 15


def test_missing_policy_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--data.prompts", "prompts.jsonl"])
    assert "required: --model.policy" in capsys.readouterr().err


def test_flags_override_files_which_override_the_environment(
    folder: Path, shortest: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "c.yaml").write_text("model: {policy: from-file}\ndata: {prompts: f.jsonl, batch_size: 7}\n")
    monkeypatch.setenv("PL_FIT__MODEL__POLICY", "from-environment")
    monkeypatch.setenv("PL_FIT__DATA__PROMPTS", "environment.jsonl")
    monkeypatch.setenv("PL_FIT__ROLLOUT__SAMPLING__TEMPERATURE", "0.3")
    monkeypatch.setenv("PL_FIT__TRAINER__MAX_EPOCHS", "9")
    config = printed_config(capsys, ["fit"])
    assert config["model"]["init_args"]["policy"] == "from-environment"
    assert config["data"]["init_args"]["prompts"] == "environment.jsonl"
    assert (config["rollout"]["sampling"]["temperature"], config["trainer"]["max_epochs"]) == (0.3, 9)
    config = printed_config(capsys, ["fit", "--config", "c.yaml", "--data.prompts", "flag.jsonl"])
    assert config["model"]["init_args"]["policy"] == "from-file"
    assert config["data"]["init_args"]["prompts"] == "flag.jsonl"
    assert config["data"]["init_args"]["batch_size"] == 7
    monkeypatch.setenv("PL_FIT__CONFIG", "c.yaml")
    assert printed_config(capsys, ["fit"])["data"]["init_args"]["batch_size"] == 7


def test_printed_config_runs(folder: Path, shortest: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The output of --print_config is an equivalent config."""
    config = printed_config(capsys, shortest)
    (folder / "printed.yaml").write_text(yaml.safe_dump(config))
    assert printed_config(capsys, ["fit", "--config", "printed.yaml"]) == config
    assert main(["fit", "--config", "printed.yaml"]) == 0


def test_other_classes_by_yaml(folder: Path, shortest: list[str]) -> None:
    """Optimizer and schedule of torch, a logger of Lightning, a selector and a reward class of the user."""
    (folder / "own_classes.py").write_text(
        "from rlhf_pl import PairSelector, Reward, RewardResult\n"
        "class Length(Reward):\n"
        "    def __init__(self, scale: float): self.scale = scale\n"
        "    def score(self, batch): return [RewardResult(self.scale * len(s.response), {'n': 1.0}) for s in batch]\n"
        "class Ends(PairSelector):\n"
        "    def __call__(self, rewards, lengths, finished, seed):\n"
        "        return [(0, 1)] if rewards[0] > rewards[1] else [(1, 0)] if rewards[1] > rewards[0] else []\n"
    )
    (folder / "own.yaml").write_text(
        """
model:
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01}}
  lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 1, gamma: 0.5}}
trainer:
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs, name: csv, version: ""}}
rollout:
  reward: {class_path: own_classes.Length, init_args: {scale: 0.5}}
  selector: {class_path: own_classes.Ends}
"""
    )
    assert main([*shortest, "--config", "own.yaml"]) == 0
    with (folder / "logs" / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["train/lr"]) for r in rows if r["train/lr"]] == pytest.approx([0.01, 0.005])
    assert [float(r["rollout/reward/n"]) for r in rows if r["rollout/reward/n"]] == [1.0]
    assert not (folder / "runs" / "cli" / "tensorboard").exists()


def test_lightnings_own_callbacks_see_the_evaluation(folder: Path, shortest: list[str]) -> None:
    """The best checkpoint by a metric, one after every update, early stopping; beside the resume points."""
    (folder / "callbacks.yaml").write_text(
        """
trainer:
  max_epochs: 3
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: best, monitor: val/reward_mean, mode: max, save_top_k: 2, filename: "{epoch}"}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: steps, every_n_train_steps: 1, save_top_k: -1}
    - class_path: lightning.pytorch.callbacks.EarlyStopping
      init_args: {monitor: val/reward_mean, mode: max, stopping_threshold: 0.0}
"""
    )
    run = [*shortest, "--data.val_prompts", "3"]
    del run[run.index("--trainer.max_epochs") : run.index("--trainer.max_epochs") + 2]
    assert main([*run, "--config", "callbacks.yaml"]) == 0
    assert len(list((folder / "best").glob("*.ckpt"))) == 1  # stopped after the first round
    assert len(list((folder / "steps").glob("*.ckpt"))) >= 1
    assert (folder / "runs" / "cli" / "checkpoints" / "after-round-0001.ckpt").exists()
    assert (folder / "runs" / "cli" / "model").exists()
    assert not (folder / "runs" / "cli" / "rounds" / "0001").exists()


def test_one_run_stays_one_run_in_its_loggers(folder: Path, shortest: list[str]) -> None:
    """The CSVLogger continues its file; only rows that are logged again move to a file beside it."""
    one = "{class_path: lightning.pytorch.loggers.%s, init_args: {save_dir: logs}}"
    run = [
        *shortest,
        "--data.val_prompts",
        "0",
        "--checkpoint.keep_rounds",
        "2",
        "--trainer.logger",
        f"[{one % 'CSVLogger'}, {one % 'TensorBoardLogger'}]",
    ]

    def rows(name: str = "metrics.csv") -> list[dict[str, str]]:
        with (folder / "logs" / "lightning_logs" / "version_0" / name).open() as file:
            return list(csv.DictReader(file))

    assert main(run) == 0
    first = rows()
    assert main([*run, "--trainer.max_epochs", "2"]) == 0
    assert [r for r in rows() if int(r["step"]) < 2] == [{**dict.fromkeys(rows()[0], ""), **r} for r in first]
    steps = [r["step"] for r in rows() if r["train/loss"]]
    assert steps == list(map(str, range(len(steps))))
    assert main([*run, "--trainer.max_epochs", "2", "--model.loss.eta", "0.5"]) == 0
    assert [r["step"] for r in rows() if r["train/loss"]] == steps
    assert {r["step"] for r in rows("metrics-before-1.csv") if r["train/loss"]} < set(steps)
    assert sorted(f.name for f in (folder / "logs" / "lightning_logs").iterdir()) == ["version_0", "version_1"]


@pytest.mark.parametrize("how", ["flag", "config"])
def test_a_logger_that_can_not_be_built_reports_why(
    folder: Path, shortest: list[str], capsys: pytest.CaptureFixture[str], how: str
) -> None:
    (folder / "logger.yaml").write_text("trainer: {logger: {class_path: lightning.pytorch.loggers.MLFlowLogger}}\n")
    arguments = ["--trainer.logger", "MLFlowLogger"] if how == "flag" else ["--config", "logger.yaml"]
    assert main([*shortest, *arguments]) == 1
    error = capsys.readouterr().err
    assert "MLFlowLogger" in error
    assert "mlflow" in error.replace("MLFlowLogger", "")
    assert "Union" not in error
    assert not (folder / "runs").exists()


def test_a_precision_plugin_counts_as_the_precision(
    folder: Path, shortest: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*shortest, "--trainer.plugins", "lightning.pytorch.plugins.precision.DoublePrecision"]) == 1
    assert "`trainer.precision`: '64-true' casts" in capsys.readouterr().err


def test_a_logger_whose_folder_can_not_be_created_is_named(
    folder: Path, shortest: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "taken").write_text("")
    assert main([*shortest, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=taken"]) == 1
    assert "`trainer.logger`: CSVLogger can't create its files: " in capsys.readouterr().err


@pytest.mark.parametrize("sign", ["distinct", "all"])
def test_guards_can_stop_a_run(
    folder: Path, shortest: list[str], capsys: pytest.CaptureFixture[str], sign: str
) -> None:
    arguments = [
        *shortest,
        "--guards.min_distinct",
        "1.0",
        "--guards.max_identical",
        "0",
        "--guards.stop_on",
        f"[{sign}]",
    ]
    repetitive = ["--rollout.sampling.max_response_tokens", "40", "--rollout.sampling.temperature", "0.3"]
    assert main([*arguments, *repetitive]) == 1
    captured = capsys.readouterr()
    assert "Stopped in round 1 (`guards.stop_on`): the responses repeat themselves" in captured.err
    assert "warning: round 1: the responses repeat" in " ".join(captured.out.split())
    assert not (folder / "runs" / "cli" / "checkpoints" / "last.ckpt").exists()


def test_printed_config_shows_the_recipes_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(capsys, ["fit", "--model.policy", "x", "--data.prompts", "y"])
    optimizer = config["model"]["init_args"]["optimizer"]
    assert optimizer["class_path"] == "rlhf_pl.optim.AdamW"
    assert optimizer["init_args"] == {
        **{"lr": "auto", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-6},
        "fused": None,
    }
    assert config["model"]["init_args"]["lr_scheduler"]["init_args"] == {
        "warmup": 0.1,
        "min_factor": 0.0,
        "span": "run",
    }
    assert config["model"]["init_args"]["loss"]["init_args"]["eta"] == "auto"
    assert config["data"]["init_args"]["val_prompts"] is None
    assert config["rollout"]["sampling"]["num_responses"] == 4
    assert config["trainer"]["precision"] == "bf16-mixed"


@pytest.mark.parametrize("config", CONFIGS, ids=[str(c.relative_to(ROOT)) for c in CONFIGS])
def test_every_shipped_config_parses(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The program accepts every setting of a config; a config with rollouts names a reward."""
    given, parsed = yaml.safe_load(config.read_text()), printed_config(capsys, ["fit", "--config", str(config)])
    assert parsed["trainer"]["default_root_dir"] == given["trainer"]["default_root_dir"]
    if "rollout" in given:
        assert parsed["rollout"]["reward"]
    else:
        assert parsed["model"]["class_path"] == f"rlhf_pl.{given['model'].get('class_path', 'RebelModule')}"


def test_help_lists_every_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in (
        *("--model.policy", "--model.kl_coef", "--data.prompts", "--rollout.reward"),
        *("--rollout.sampling.num_responses", "--samples.num_prompts", "--export.folder"),
    ):
        assert option in text


def test_module_and_help_import_no_heavy_packages() -> None:
    code = (
        "import sys; from rlhf_pl.__main__ import main; main(['--help']); "
        "print(sorted({'torch', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "rlhf-pl COMMAND" in done.stdout
    assert done.stdout.endswith("[]\n")
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_pl", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.startswith("rlhf-pl ")
    wrong = subprocess.run([sys.executable, "-m", "rlhf_pl", "train"], capture_output=True, text=True, cwd=ROOT)
    assert wrong.returncode == 2
    assert "unknown command 'train'" in wrong.stderr


def test_plain_callbacks_is_refused() -> None:
    """Imported from the repository's root, `callbacks` would be a second copy of every class."""
    done = subprocess.run([sys.executable, "-c", "import callbacks"], capture_output=True, text=True, cwd=ROOT)
    assert "rlhf_pl.callbacks" in done.stderr
