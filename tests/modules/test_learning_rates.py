"""Learning rates by the model's size: `lr: auto`."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf_pl import LoRA, RebelModule, RewardModelModule, SFTModule
from rlhf_pl.modules.learning_rates import LORA_FACTOR, suitable_rate
from rlhf_pl.optim import AdamW, WarmupCosine
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils.errors import InputError
from tests.integration.test_fit import PROMPTS, fit


@pytest.mark.parametrize(
    ("stage", "rates"),
    [
        ("policy", (3.0e-5, 3.2e-6, 5.0e-7)),
        ("sft", (1.5e-4, 3.5e-5, 1.0e-5)),
        ("reward_model", (7.6e-5, 1.7e-5, 5.0e-6)),
    ],
)
def test_larger_models_get_lower_rates(stage: str, rates: tuple[float, ...]) -> None:
    """Of a model with 135 million, 1.24 and 8.03 billion parameters: 4e-6 / 0.135 = 3.0e-5 for a policy."""
    for parameters, rate in zip((135e6, 1.24e9, 8.03e9), rates, strict=True):
        assert suitable_rate(int(parameters), stage) == pytest.approx(rate)  # type: ignore[arg-type]


def test_adapters_get_a_higher_rate_and_no_rate_exceeds_the_cap() -> None:
    assert suitable_rate(1_240_000_000, "policy", lora=True) == pytest.approx(LORA_FACTOR * 3.2e-6)
    caps = {stage: suitable_rate(100_000, stage) for stage in ("policy", "sft", "reward_model")}  # type: ignore[arg-type]
    assert caps == {"policy": 3e-5, "sft": 2e-4, "reward_model": 1e-4}
    assert suitable_rate(1, "sft", lora=True) == pytest.approx(LORA_FACTOR * caps["sft"])


def test_auto_is_refused_where_the_model_is_unknown() -> None:
    with pytest.raises(InputError, match=r"`lr` of rlhf_pl\.optim\.AdamW is auto.*Give a number"):
        AdamW([torch.nn.Parameter(torch.zeros(1))])


def test_each_module_resolves_the_rate_for_its_own_stage(llama: Path) -> None:
    modules = [RebelModule(str(llama)), SFTModule(str(llama)), RewardModelModule(str(llama))]
    assert [module.stage for module in modules] == ["policy", "sft", "reward_model"]
    for module in [*modules, RebelModule(str(llama), lora=LoRA(rank=2))]:
        counted = sum(parameter.numel() for parameter in module.empty_model().parameters())
        rate = suitable_rate(counted, module.stage, module.lora is not None)
        assert module.optimization.settings()["optimizer"]["lr"] == module.suitable_rate == rate


def test_the_resolved_rate_is_recorded_logged_and_resumed(
    llama: Path, tmp_path: Path, write_jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A constant schedule: `train/lr` is the rate itself, before and after a resume."""
    module = {"optimizer": lambda p: AdamW(p), "lr_scheduler": lambda o: WarmupCosine(o, warmup=0.0, min_factor=1.0)}
    folder, prompts = tmp_path / "run", write_jsonl(PROMPTS)
    _, first = fit(folder, llama, prompts, module=module, max_epochs=1, enable_checkpointing=True)
    last = sorted(folder.rglob("*.ckpt"))[-1]
    fit(folder, llama, prompts, module=module, ckpt_path=str(last), enable_checkpointing=True)
    rate = first.suitable_rate
    assert f"Learning rate: {rate:g}, chosen for the model's size" in capsys.readouterr().out
    settings = RoundStore(folder).round(1).manifest["settings"]["training"]
    assert f"{rate}" in str(settings["optimizer"])
    assert "auto" not in str(settings["optimizer"])
    with (folder / "csv" / "metrics.csv").open() as file:
        rates = [float(row["train/lr"]) for row in csv.DictReader(file) if row.get("train/lr")]
    assert rates == pytest.approx([rate] * len(rates))
    assert len(rates) > 2
