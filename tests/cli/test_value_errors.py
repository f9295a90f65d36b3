"""A wrong value is refused in one sentence: the option in full, its value, and what it must be."""

from pathlib import Path

import pytest
import yaml

from rlhf_pl.__main__ import main

SHORTEST = "--model.policy x --data.prompts x --trainer.default_root_dir run --rollout.reward"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "huber_losses.py").write_text("class Huber: pass\n")
    (tmp_path / "lacking_losses.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error of a run that is refused as a wrong command line."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments])
    assert stop.value.code == 2
    first, *rest = capsys.readouterr().err.splitlines()
    assert rest == ["`rlhf-pl fit --help` lists the options."]
    return first


@pytest.mark.parametrize(
    ("option", "value", "must_be"),
    [
        ("trainer.precision", "bf17", "one of transformer-engine, "),
        ("trainer.precision", "bf17", "64, 32, 16, bf16, or null. Did you mean bf16?"),
        ("trainer.max_epochs", "many", "an integer or null."),
        ("model.optimizer.lr", "fast", "a number or auto."),
        ("model.loss.eta", "high", "a number or auto."),
        ("model.dtype", "float17", "one of float32, bfloat16, float16."),
        ("data.batch_size", "many", "an integer."),
        ("rollout.sampling.top_p", "1o", "a number."),
        ("rollout.scoring.isolate", "maybe", "true or false."),
    ],
)
def test_a_wrong_value_is_named_with_what_it_must_be(
    capsys: pytest.CaptureFixture[str], option: str, value: str, must_be: str
) -> None:
    error = refused(capsys, *SHORTEST.split(), "m.score", f"--{option}", value)
    assert error.startswith(f"error: `{option}` is {value!r}, but must be ")
    assert must_be in error


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("huber_losses.Huger", "the module 'huber_losses' has no class 'Huger'. Did you mean Huber?"),
        ("huber_losses.Nope", "the module 'huber_losses' has no class 'Nope'."),
        ("nowhere.Nope", "but there is no module 'nowhere' in "),
        ("lacking_losses.Nope", "whose module 'lacking_losses' imports 'no_such_package', which is not installed."),
    ],
)
def test_a_class_that_can_not_be_imported_is_named_with_the_reason(
    capsys: pytest.CaptureFixture[str], name: str, says: str
) -> None:
    error = refused(capsys, *SHORTEST.split(), "m.score", "--model.loss", name)
    assert error.startswith(f"error: `model.loss` is {name!r}, ")
    assert says in error


def test_a_missing_option_of_a_class_has_its_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, *SHORTEST.split(), "ClassifierReward")
    assert "`rollout.reward.model`: ClassifierReward requires it. Add --rollout.reward.model MODEL, in a " in error
    assert "`rollout.reward.init_args.model`" in error
    error = refused(capsys, *SHORTEST.split(), "JudgePairReward", "--rollout.reward.url", "http://127.0.0.1:9")
    assert "`rollout.reward.model`: JudgePairReward requires it." in error


def test_values_of_a_config_file_are_named_alike(capsys: pytest.CaptureFixture[str]) -> None:
    loss = {"class_path": "PPOLoss", "init_args": {"clip_low": "low"}}
    model = {"class_path": "PPOModule", "init_args": {"policy": "x", "loss": loss}}
    Path("c.yaml").write_text(yaml.safe_dump({"model": model, "data": {"prompts": "x"}}))
    error = refused(capsys, "--config", "c.yaml", "--rollout.reward", "m.score")
    assert error == "error: `model.loss.clip_low` is 'low', but must be a number or null."
    loss["init_args"] = {}
    Path("c.yaml").write_text(yaml.safe_dump({"model": model, "rollout": {"reward": {"class_path": "HTTPReward"}}}))
    error = refused(capsys, "--config", "c.yaml", "--data.prompts", "x")
    assert error.startswith("error: `rollout.reward.url`: HTTPReward requires it.")


def test_an_option_that_a_class_lacks_is_named_with_those_like_it(capsys: pytest.CaptureFixture[str]) -> None:
    shortest = [*SHORTEST.split(), "m.score"]
    error = refused(capsys, *shortest, "--model.loss", "GRPOLoss", "--model.loss.eta", "1")
    assert error == (
        "error: `model.loss.eta`: GRPOLoss has no option 'eta'. `rlhf-pl fit --model.loss.help GRPOLoss` explains its "
        "options."
    )
    error = refused(capsys, *shortest, "--model.lora", "LoRA", "--model.lora.ranks", "4")
    assert error.startswith("error: `model.lora.ranks`: LoRA has no option 'ranks'. Did you mean model.lora.rank?")
    error = refused(capsys, *shortest, "--model", "PPOModule", "--model.critic.lrr", "1")
    assert error.startswith("error: unrecognized arguments: --model.critic.lrr=1")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--model.optimizer torch.optim.AdamW --model.optimizer.lr fast", "lr` is 'fast', but must be a number."),
        ("--model.optimizer torch.optim.Adem", "the module 'torch.optim' has no class 'Adem'. Did you mean Adam?"),
        ("--model.optimizer Adem", "there is no class 'Adem'. Did you mean Adam"),
        ("--model.optimizer.betas 0.9", "betas` is '0.9', but must be a list such as [a, b]."),
        ("--model.optimizer.betas [0.9,x]", "`model.optimizer.betas` is 'x', but must be a number."),
        ("--guards.stop_on kl", "`guards.stop_on` is 'kl', but must be a list such as [a, b] or null."),
        ("--model.lr_scheduler WarmupCosin", "there is no class 'WarmupCosin'. Did you mean WarmupCosine"),
        ("--model.lr_scheduler StepLR", "`model.lr_scheduler.step_size`: StepLR requires it."),
        ("--trainer.callbacks EarlyStoping", "there is no class 'EarlyStoping'. Did you mean EarlyStopping?"),
        ("--trainer.callbacks+=EarlyStopping", "`trainer.callbacks.monitor`: EarlyStopping requires it."),
        ("--model PPOModule --model.critic.lr x", "`model.critic.lr` is 'x', but must be a number or null."),
    ],
)
def test_options_of_classes_outside_of_this_package_are_named_in_full(
    capsys: pytest.CaptureFixture[str], arguments: str, says: str
) -> None:
    assert says in refused(capsys, *SHORTEST.split(), "m.score", *arguments.split())


@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        ({"max_epocs": 3}, "option 'trainer.max_epocs'. Did you mean --trainer.max_epochs"),
        (
            {"callbacks": [{"class_path": "EarlyStopping"}]},
            "`trainer.callbacks[0].monitor`: EarlyStopping requires it. Add `trainer.callbacks[0].init_args.monitor`.",
        ),
        (
            {"callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "loss", "patience": "long"}}]},
            "`trainer.callbacks[0].patience` is 'long', but must be an integer.",
        ),
        (
            {"logger": [{"class_path": "CSVLogger", "init_args": {"save_dirr": "logs"}}]},
            "CSVLogger has no option 'save_dirr'. Did you mean trainer.logger[0].save_dir?",
        ),
    ],
)
def test_items_of_lists_in_a_config_file_are_named_by_their_number(
    capsys: pytest.CaptureFixture[str], trainer: dict[str, object], says: str
) -> None:
    Path("c.yaml").write_text(yaml.safe_dump({"model": {"policy": "x"}, "data": {"prompts": "x"}, "trainer": trainer}))
    assert says in refused(capsys, "--config", "c.yaml")
