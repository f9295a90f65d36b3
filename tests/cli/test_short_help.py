"""`rlhf-pl fit --help`: every option of this package on a few screens, and Lightning's with `--help_all`."""

import re

import pytest

from rlhf_pl.__main__ import main


def _help(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 120])
def test_the_short_help_has_every_option_of_ours(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The long help is made by jsonargparse from the parser itself, so its options are those that the command has."""
    monkeypatch.setenv("COLUMNS", str(columns))
    short, everything = _help(capsys, "--help"), _help(capsys, "--help_all")
    option = re.compile(r"^ +(?:ARG: +)?(?:-\w, )?(--[\w.]+)", re.MULTILINE)
    ours = {
        name
        for name in option.findall(everything)
        if not name.startswith(("--trainer", "--optimizer", "--lr_scheduler")) and not name.endswith((".help", "+"))
    }
    groups = {name for name in ours if any(other.startswith(f"{name}.") for other in ours)}
    assert len(ours) > 70
    assert ours - groups - {"--help", "--model", "--data", "--weights_only"} <= set(re.findall(r"--[\w.]+", short))
    assert "--trainer.limit_val_batches" in everything
    lines = short.splitlines()
    assert len(lines) <= 140
    assert lines[0].startswith("usage: rlhf-pl fit")
    assert "rlhf-pl fit --model.policy MODEL" in lines[2]
    options = [line for line in lines if line.startswith("  --") and "--traceback" not in line]
    assert max(map(len, options)) <= columns
    assert "<lambda>" not in short
    assert "[4]" in next(line for line in lines if "--data.batch_size" in line)


@pytest.mark.parametrize(
    ("option", "name", "own"),
    [("--model.help", "PPOModule", "--model.critic.model"), ("--data.help", "SFTDataModule", "--data.loss_on")],
)
def test_the_help_of_a_class_has_its_own_options(
    option: str, name: str, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = _help(capsys, option, name)
    assert own in text
    assert "--trainer." not in text
