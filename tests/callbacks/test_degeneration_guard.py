"""Signs of collapse are measured by their definitions; each of them warns, or stops the run where configured."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from rlhf_pl.callbacks import DegenerationGuard, RoundCheckpoint
from rlhf_pl.callbacks.degeneration_guard import SIGNS, DegenerationError
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils.errors import InputError
from tests.callbacks.conftest import Log, SmallRun

Again = Callable[..., Any]


def measure(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Distinct trigrams in a response and responses equal to another one to their prompt, by the definitions."""
    shares, same = [], 0
    for i, row in enumerate(rows):
        tokens = row["response_tokens"]
        trigrams = [tuple(tokens[k : k + 3]) for k in range(len(tokens) - 2)]
        shares.append(len(set(trigrams)) / len(trigrams) if trigrams else 1.0)
        others = rows[:i] + rows[i + 1 :]
        same += any(o["prompt_id"] == row["prompt_id"] and o["response_tokens"] == tokens for o in others)
    return {"rollout/distinct_3": sum(shares) / len(rows), "rollout/identical_share": same / len(rows)}


def measured_values(run: SmallRun) -> dict[str, float]:
    """The value behind each sign, by option: of the first round, except for the ratio of lengths."""
    first, second = (run.store.round(i) for i in range(2))
    lengths = [stored.info("responses")["tokens_mean"] for stored in (first, second)]
    kls = (first.info("training")["kl"], run.store.held_out(1).info("kl")["new_old"])
    return {
        "max_kl": max(kls),
        "min_distinct": run.log.of("rollout/distinct_3")[0][1],
        "max_identical": run.log.of("rollout/identical_share")[0][1],
        "max_length_ratio": max(lengths) / min(lengths),
        "min_pair_share": first.info("pairs")["pairs"] / first.info("pairs")["prompts"],
        "min_reward_std": first.info("rewards")["std"],
    }


def exceeded_limits(run: SmallRun) -> dict[str, float]:
    """Limits that the run exceeds by the smallest possible difference."""
    return {
        name: math.nextafter(value, 0.0 if name.startswith("max") else math.inf)
        for name, value in measured_values(run).items()
    }


def test_a_rounds_responses_are_measured_before_its_first_update(run: SmallRun) -> None:
    for index, step in enumerate((0, run.updates[0])):
        expected = measure(run.rows("rounds", index))
        assert 0 < expected["rollout/identical_share"] < 1
        assert 0 < expected["rollout/distinct_3"] < 1
        (logged,) = [m for s, m in run.log.metrics if s == step and "rollout/distinct_3" in m]
        assert logged == pytest.approx(expected)
        position = run.log.metrics.index((step, logged))
        assert position < next(i for i, (s, m) in enumerate(run.log.metrics) if s == step and "train/loss" in m)


def test_warnings_are_counted_printed_and_stored(run: SmallRun) -> None:
    """The rounds' responses give no warning; both rounds' KL is above the limit of 1e-6."""
    updates = run.trainer.global_step
    first = run.updates[0]
    assert run.log.of("guard/warnings") == [(0, 0.0), (first - 1, 1.0), (first, 0.0), (updates - 1, 1.0)]
    for index in range(2):
        stored = run.store.round(index)
        old, new = stored.info("training")["kl"], run.store.held_out(index + 1).info("kl")["new_old"]
        named = [("KL(old || new)", old), ("KL(new || old) on held-out prompts", new)]
        text = ", ".join(f"{name} {kl:.1f}" for name, kl in named if kl > 1e-6)
        assert stored.manifest["warnings"]["kl"].startswith(f"{text} nats per response (k1), above 1e-06; lower")
        assert f"warning: round {index + 1}: {stored.manifest['warnings']['kl']}." in run.printed


def test_values_at_their_limits_give_no_warning(
    run: SmallRun, again: Again, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again(DegenerationGuard(**measured_values(run)), max_epochs=1)
    assert "warning" not in capsys.readouterr().out
    assert set(RoundStore(tmp_path / "run").round(0).manifest["warnings"]) == {"kl"}  # of the first run


def test_values_just_beyond_their_limits_are_reported_with_numbers(
    run: SmallRun, again: Again, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits, values = exceeded_limits(run), measured_values(run)
    again(DegenerationGuard(**limits), max_epochs=2)
    printed = " ".join(capsys.readouterr().out.split())
    first, second = (RoundStore(tmp_path / "run").round(i).manifest["warnings"] for i in range(2))
    assert set(first) == set(SIGNS) - {"length"}  # lengths are compared with the first round's
    assert "length" in second
    assert all(f"round 1: {text}." in printed for text in first.values())
    pairs = run.store.round(0).info("pairs")
    lengths = [run.store.round(i).info("responses")["tokens_mean"] for i in range(2)]
    for text, numbers in (
        (first["distinct"], f"{values['min_distinct']:.0%} of their trigrams of tokens are distinct"),
        (first["identical"], f"{values['max_identical']:.0%} of the responses equal another one"),
        (first["pairs"], f"{pairs['pairs']} of {pairs['prompts']} prompts give a usable pair ("),
        (first["reward_std"], f"standard deviation {values['min_reward_std']:.2g}, below"),
        (first["kl"], f"{values['max_kl']:.1f} nats per response (k1), above {values['max_kl']:g}"),
        (second["length"], f"the mean response has {lengths[1]:.0f} tokens, compared with {lengths[0]:.0f} in round 1"),
    ):
        assert numbers in " ".join(text.split())


@pytest.mark.parametrize("sign", SIGNS)
def test_a_sign_can_stop_the_run_where_others_only_warn(run: SmallRun, again: Again, tmp_path: Path, sign: str) -> None:
    """Before the policy trains on such responses; for the KL, after the round that exceeds it."""
    steps: list[int] = []

    class Steps(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            steps.append(trainer.global_step)

    with pytest.raises(DegenerationError, match=r"\(`guards\.stop_on`\)") as error:
        again(Steps(), DegenerationGuard(**exceeded_limits(run), stop_on=[sign]), max_epochs=2)
    stopped_in = 2 if sign == "length" else 1
    texts = RoundStore(tmp_path / "run").round(stopped_in - 1).manifest["warnings"]
    assert f"Stopped in round {stopped_in} (`guards.stop_on`): {texts[sign]}." in str(error.value)
    assert [name for name, text in texts.items() if text in str(error.value)] == [sign]
    assert (steps[-1] if steps else 0) == (run.updates[0] if sign in ("kl", "length") else 0)


def test_a_run_resumed_inside_a_round_has_its_metrics(run: SmallRun, again: Again, tmp_path: Path) -> None:
    """Callbacks can monitor them; metrics that the first process has logged are not logged again."""
    guard = {"min_reward_std": 100.0}
    again(DegenerationGuard(**guard), RoundCheckpoint(), max_steps=1, enable_checkpointing=True)
    seen: dict[str, float] = {}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            seen.update({n: float(v) for n, v in trainer.callback_metrics.items()} if not seen else {})

    options: dict[str, Any] = {"ckpt_path": str(tmp_path / "run" / "checkpoints" / "last.ckpt"), "logger": Log()}
    again(DegenerationGuard(**guard), RoundCheckpoint(), Look(), enable_checkpointing=True, **options)
    assert seen | measure(run.rows("rounds", 0)) == pytest.approx(seen)
    assert seen["guard/warnings"] == 2.0  # `reward_std`, and `kl` of the copied run
    assert options["logger"].of("rollout/distinct_3") == []


def test_runs_without_rounds_are_ignored(tmp_path: Path) -> None:
    from lightning.pytorch.demos.boring_classes import BoringModel

    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, max_epochs=1, limit_train_batches=2, limit_val_batches=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[DegenerationGuard(stop_on=["all"])],
    )  # fmt: skip
    trainer.fit(BoringModel())
    assert trainer.global_step == 2
    assert "guard/warnings" not in trainer.callback_metrics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_kl": 0.0}, r"`guards\.max_kl` must be above 0 nats, got 0\.0"),
        ({"min_distinct": 1.5}, r"`guards\.min_distinct` must be a share from 0 to 1, got 1\.5"),
        ({"max_identical": -0.1}, r"`guards\.max_identical` must be a share from 0 to 1"),
        ({"max_length_ratio": 0.5}, r"`guards\.max_length_ratio` must be 1 or more"),
        ({"min_pair_share": 2.0}, r"`guards\.min_pair_share` must be a share from 0 to 1"),
        ({"min_reward_std": math.inf}, r"`guards\.min_reward_std` must be 0 or more, and finite"),
        ({"stop_on": ["kl", "boredom"]}, r"`guards\.stop_on` names \['boredom'\]; the signs are kl, distinct"),
    ],
)
def test_wrong_options_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DegenerationGuard(**options)
