"""`rlhf-pl fit --rounds_from RUN_DIR`, with the config of that run, which an earlier version has made."""

import functools
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from rlhf_pl.__main__ import main
from rlhf_pl.rewards import CombinedReward
from rlhf_pl.rollout import TransformersSampler
from rlhf_pl.rounds.stages.given import read_given
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.store.source_run import SourceRun
from tests.checkpointing.stored_run import restore_inputs, restore_run

COMMAND = ["fit", "--config", "run.yaml", "--rounds_from", "run", "--trainer.max_epochs", "1"]
ELSEWHERE = ["--trainer.default_root_dir", "again"]


def restore(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> RoundStore:
    restore_inputs(kind, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "user_parts", raising=False)
    return RoundStore(restore_run(kind, folder))


def refuse_to_build(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    @functools.wraps(kind.__init__)  # type: ignore[misc]
    def unbuilt(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"{kind.__name__} was built.")

    monkeypatch.setattr(kind, "__init__", unbuilt)


def test_the_config_of_a_run_trains_on_its_rounds_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither its sampler nor its reward is built; log-probs are as they were, and the run is only read."""
    store = restore("between", tmp_path, monkeypatch)
    before = {file: file.stat().st_mtime_ns for file in sorted(store.run_dir.rglob("*"))}
    refuse_to_build(TransformersSampler, monkeypatch)
    refuse_to_build(CombinedReward, monkeypatch)
    assert main([*COMMAND, *ELSEWHERE]) == 0, capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in sorted(store.run_dir.rglob("*"))} == before
    found, original = RoundStore("again").round(0), store.round(0)
    assert not found.manifest["rounds_from"]["off_policy"]
    for stage in ("responses", "rewards"):
        assert found.read(stage).equals(original.read(stage))
    given = read_given(SourceRun("run").round(0))
    assert given is not None
    keys = ["prompt_id", "response_index"]
    joined = found.read("logps").join(given, keys, right_suffix="_before")
    assert len(joined) == len(given) == 8
    assert joined["old_logp"].to_pylist() == pytest.approx(joined["old_logp_before"].to_pylist(), abs=1e-4)
    printed = capsys.readouterr().out
    assert "KL(old||new)" in printed
    assert "after:" not in printed
    assert main(["rounds", "again", "--round", "1"]) == 0
    assert f"rounds_from.run: {store.run}" in capsys.readouterr().out
    shutil.rmtree("run")
    assert main(["fit", "--config", "again/config.yaml"]) == 0


def test_log_probs_by_pair_are_read_by_response(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = restore("inside", tmp_path, monkeypatch)
    given = read_given(SourceRun("run").round(1))
    assert isinstance(given, pa.Table)
    values = {(r["prompt_id"], r["response_index"]): r["old_logp"] for r in given.to_pylist()}
    logps, pairs = store.round(1).read("logps").to_pylist(), store.round(1).read("pairs").to_pylist()
    expected = {
        (pair["prompt_id"], pair[f"{which}_index"]): row[f"{which}_old_logp"]
        for row, pair in zip(logps, pairs, strict=True)
        for which in ("chosen", "rejected")
    }
    assert values == expected
    assert main([*COMMAND[:-1], "2", *ELSEWHERE]) == 0


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("between", [], "which is also this run's directory (`trainer.default_root_dir` is 'run')"),
        ("scoring", ELSEWHERE, "responses and rewards of its first round are not complete yet"),
        ("between", [*ELSEWHERE, "--data", "OfflineDataModule", "--data.pairs", "pairs.jsonl"], "OfflineDataModule tr"),
    ],
)
def test_wrong_uses_are_refused_in_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    arguments: list[str],
    message: str,
) -> None:
    restore(kind, tmp_path, monkeypatch)
    assert main([*COMMAND, *arguments]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert not Path("again").exists()


def test_a_plan_of_stored_rounds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    restore("between", tmp_path, monkeypatch)
    assert main(["plan", *COMMAND[1:]]) == 1
    assert "`rlhf-pl plan` estimates runs that sample" in capsys.readouterr().err
