"""The help of commands and classes begins with what is typed."""

import sys

import pytest

from rlhf_pl.__main__ import main


def _help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["rlhf-pl", *arguments])
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["plan", "score", "rounds"])
def test_a_commands_help_begins_with_usage_and_example(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    lines = _help(capsys, monkeypatch, [command, "--help"]).splitlines()
    assert lines[0].startswith(f"usage: rlhf-pl {command} ")
    assert any(line.startswith(f"  rlhf-pl {command} ") for line in lines[1:5])


@pytest.mark.parametrize(
    ("option", "name", "member"),
    [
        ("--model", "PPOModule", "critic.lora"),
        ("--data", "SFTDataModule", "packing"),
        ("--rollout.sampler", "VLLMSampler", "kv_cache_gib"),
        ("--rollout.reward", "ClassifierReward", "model"),
        ("--model.loss", "GRPOLoss", "clip_low"),
    ],
)
@pytest.mark.parametrize("joined", [False, True])
def test_the_help_of_a_class_has_its_options_as_they_are_typed(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    name: str,
    member: str,
    joined: bool,
) -> None:
    asked = [f"{option}.help={name}"] if joined else [f"{option}.help", name]
    out = _help(capsys, monkeypatch, ["fit", *asked])
    assert out.startswith(f"usage: rlhf-pl fit {option} ")
    assert f"  {option}.{member}" in out
    typed = [line.split()[0] for line in out.splitlines() if line.startswith("  --")]
    assert all(each.startswith(option) for each in typed)
