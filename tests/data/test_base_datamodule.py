"""The common behaviour of all DataModules."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest

from rlhf_pl import OfflineDataModule, PreferenceDataModule, RoundDataModule, SFTDataModule
from rlhf_pl.utils.errors import InputError

KINDS: list[Callable[..., Any]] = [RoundDataModule, OfflineDataModule, PreferenceDataModule, SFTDataModule]
HELD_OUT = ["val_prompts", "val_pairs", "val_preferences", "val_conversations"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_defaults_to_that_of_the_run(kind: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "41")
    data = kind("rows.jsonl")
    assert data.seed == 41
    monkeypatch.setenv("PL_GLOBAL_SEED", "42")
    assert data.seed == 42
    assert kind("rows.jsonl", seed=0).seed == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("option", "least"), [("batch_size", 1), ("num_workers", 0)])
def test_common_options_are_checked_by_name(kind: Callable[..., Any], option: str, least: int) -> None:
    with pytest.raises(InputError, match=f"`data.{option}` must be {least} or more, got {least - 1}"):
        kind("rows.jsonl", **{option: least - 1})


@pytest.mark.parametrize(("kind", "option"), zip(KINDS, HELD_OUT, strict=True))
def test_the_number_of_held_out_rows_is_checked_before_rows_are_read(kind: Callable[..., Any], option: str) -> None:
    with pytest.raises(InputError, match=f"`data.{option}` must be a share below 1 or a whole number, got 1.5"):
        kind("rows.jsonl", **{option: 1.5})
    kind("rows.jsonl", **{option: "held_out.jsonl"})


@pytest.mark.parametrize("kind", KINDS)
def test_setup_requires_a_trainer(kind: Callable[..., Any]) -> None:
    data = kind("rows.jsonl")
    assert isinstance(data, L.LightningDataModule)
    with pytest.raises(RuntimeError, match="works inside a Trainer"):
        data.setup("fit")
