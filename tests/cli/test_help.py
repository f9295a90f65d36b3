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


@pytest.mark.parametrize("command", ["plan", "score", "rounds", "compare"])
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
    assert out.startswith(f"usage: rlhf-pl fit {option} {name} ")
    assert f"  {option}.{member}" in out
    assert all(each.startswith(option) for each in _typed(out))
    planned = _help(capsys, monkeypatch, ["plan", *asked])  # may list further classes, that were loaded meanwhile
    assert _typed(planned) == _typed(out)


def _typed(text: str) -> list[str]:
    """The options that a help lists."""
    return [line.split()[0] for line in text.splitlines() if line.startswith("  --")]


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ("--model.lora.help LoRA", "--model.lora.rank"),
        ("--model.lora.help=LoRA", "--model.lora.alpha"),
        ("--model PPOModule --model.critic.lora.help", "--model.critic.lora.rank"),
        ("--model.loss GRPOLoss --model.loss.correction.help", "--model.loss.correction.mode"),
        ("--model.optimizer.help AdamW", "--model.optimizer.weight_decay"),
        ("--rollout.sampling.help SamplingConfig", "--rollout.sampling.top_p"),
        ("--rollout.sampler.help", "--rollout.sampler.kv_cache_gib"),
        ("--checkpoint.help", "--checkpoint.keep_rounds"),
        ("--model.help", "--model.kl_coef"),
    ],
)
def test_the_help_of_a_group_needs_no_class(capsys: pytest.CaptureFixture[str], arguments: str, option: str) -> None:
    assert main(["fit", *arguments.split()]) == 0
    out = capsys.readouterr().out
    assert main(["plan", *arguments.split()]) == 0  # which has the options of `fit`
    assert capsys.readouterr().out == out
    group = option.rpartition(".")[0]
    assert out.startswith(f"usage: rlhf-pl fit {group}.OPTION VALUE")
    assert f"\n  {option} " in out
    assert f"{group}.params" not in out
