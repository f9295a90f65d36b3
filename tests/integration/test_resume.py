"""A run directory that is used again repeats only changed or damaged stages, or nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_pl.__main__ import main
from rlhf_pl.rollout import TransformersSampler
from rlhf_pl.store.round_store import RoundStore
from tests.conftest import save_llama

REWARDS = """
def length(response): return len(response) / 10
def variety(response): return len(set(response)) / 10
def nan_sometimes(response, prompt_id):
    calls.append(prompt_id)
    return float("nan") if prompt_id == "p3" and response not in TRIAL else len(response) / 10
calls = []
TRIAL = ("Yes, of course. Here is what I would do.", "", "word " * 40)
"""
Fit = Callable[..., int]


class PromptCounter:
    """Counts the prompts that samplers receive, without the checks of weight syncs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts = 0
        original = TransformersSampler.generate

        def generate(sampler: TransformersSampler, prompts: list, sampling: object):
            self.prompts += len(prompts) if prompts[0].seed > 1000 else 0
            return original(sampler, prompts, sampling)

        monkeypatch.setattr(TransformersSampler, "generate", generate)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> PromptCounter:
    return PromptCounter(monkeypatch)


@pytest.fixture
def fit(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    rows = [{"prompt_id": f"p{i}", "prompt": f"What is {i} plus {i}?"} for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "resume_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {
        **{"model.policy": llama, "model.optimizer.lr": "1e-3", "data.prompts": "prompts.jsonl"},
        **{"data.max_prompt_tokens": 64, "data.prompts_per_round": 8, "data.val_prompts": 4},
        **{"rollout.reward": "resume_rewards.variety", "rollout.sampler": "TransformersSampler"},
        **{"rollout.sampler.dtype": "float32", "rollout.sampling.max_response_tokens": 6},
        **{"rollout.sampling.num_responses": 3, "rollout.prompts_per_shard": 2, "trainer.max_epochs": 2},
        **{"trainer.accelerator": "cpu", "rollout.scoring.retries": 0, "data.batch_size": 2},
        **{"trainer.precision": "32-true", "model.loss.eta": 1.0},
        "checkpoint.keep_rounds": 2,  # so that the last round can be trained again
    }

    def run(folder: str, *arguments: str, **changes: object) -> int:
        settings = options | {name.replace("__", "."): value for name, value in changes.items()}
        listed = [str(text) for name, value in settings.items() for text in (f"--{name}", value)]
        return main(["fit", *listed, "--trainer.default_root_dir", folder, *arguments])

    return run


def list_shards(folder: str, kind: str = "rounds") -> dict[str, list[str]]:
    """List the shards by round and stage; their names have checksums."""
    found: dict[str, list[str]] = {}
    for file in sorted((Path(folder) / kind).rglob("*.parquet")):
        found.setdefault(f"{file.parts[-3]}/{file.parts[-2]}", []).append(file.name)
    return found


def read_export(folder: str) -> bytes:
    return (Path(folder) / "model" / "model.safetensors").read_bytes()


def changed_stages(before: dict[str, list[str]], after: dict[str, list[str]]) -> set[str]:
    return {stage for stage in before.keys() | after.keys() if before.get(stage) != after.get(stage)}


def test_a_finished_run_started_again_does_nothing(
    fit: Fit, counter: PromptCounter, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("run") == 0
    before, model, sampled = list_shards("run"), read_export("run"), counter.prompts
    assert sampled == 2 * 8 + 3 * 4
    assert fit("run") == 0
    assert fit("run", "--ckpt_path", "last") == 0
    assert (list_shards("run"), read_export("run"), counter.prompts) == (before, model, sampled)
    assert "Resuming from run/checkpoints/after-round-0002.ckpt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "stages", "message"),
    [
        (
            {"model__loss__eta": 3.0},
            set(),
            "eta=1.0) -> rlhf_pl.RebelLoss(eta=3.0). Round 2 is trained on again",
        ),
        ({"model__optimizer__lr": 2e-3}, set(), "lr: 0.001 -> 0.002. Round 2 is trained on again"),
        ({"rollout__selector": "RandomPair"}, {"pairs", "logps"}, "Round 2 is paired again"),
        ({"rollout__reward": "resume_rewards.length"}, {"rewards", "pairs", "logps"}, "Round 2 is scored again"),
    ],
)
def test_a_change_downstream_repeats_only_the_later_stages(
    fit: Fit,
    counter: PromptCounter,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object],
    stages: set[str],
    message: str,
) -> None:
    assert fit("run") == 0
    before, model, sampled = list_shards("run"), read_export("run"), counter.prompts
    capsys.readouterr()
    assert fit("run", **change) == 0
    assert message in " ".join(capsys.readouterr().out.split())
    assert changed_stages(before, list_shards("run")) == {f"0001/{stage}" for stage in stages}
    assert counter.prompts == sampled + 4  # the newly trained policy gets the held-out prompts, and no others
    assert read_export("run") != model
    assert len(list(Path("run/checkpoints/superseded").iterdir())) == 1
    # the same command again changes nothing
    after = read_export("run")
    assert fit("run", **change) == 0
    assert read_export("run") == after


def test_a_round_trained_again_equals_a_run_with_the_new_settings(fit: Fit) -> None:
    """With one round, the whole run depends on the starting policy."""
    assert fit("changed", trainer__max_epochs=1) == 0
    assert fit("changed", trainer__max_epochs=1, model__loss__eta=4.0, model__optimizer__lr=5e-4) == 0
    assert fit("direct", trainer__max_epochs=1, model__loss__eta=4.0, model__optimizer__lr=5e-4) == 0
    assert list_shards("changed") == list_shards("direct")
    assert read_export("changed") == read_export("direct")


def test_the_configs_learning_rate_applies_after_a_resume(fit: Fit) -> None:
    """A run resumed with another rate uses it instead of the checkpoint's."""
    assert fit("run", trainer__max_epochs=1) == 0
    assert fit("run", trainer__max_epochs=2, model__optimizer__lr=0.0) == 0
    first, second = (RoundStore("run").held_out(v).manifest["settings"]["responses"]["weights"] for v in (1, 2))
    assert first == second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollout__sampling__temperature": 0.5}, "sampling.temperature: 1.0 -> 0.5"),
        ({"data__prompts_per_round": 4}, "prompts_per_round: 8 -> 4"),
        ({"data__system_prompt": "Be brief."}, "prompts: "),
        ({"seed_everything": 9}, "seed: 1 -> 9"),
    ],
)
def test_a_change_upstream_is_refused_with_the_choices(
    fit: Fit, capsys: pytest.CaptureFixture[str], change: dict[str, object], message: str
) -> None:
    assert fit("run", trainer__max_epochs=1) == 0
    everything = {str(f): f.stat().st_mtime_ns for f in Path("run").rglob("*") if f.is_file()}
    capsys.readouterr()
    assert fit("run", trainer__max_epochs=1, **change) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "--trainer.default_root_dir" in error
    assert "--accept_changes" in error
    assert everything == {str(f): f.stat().st_mtime_ns for f in Path("run").rglob("*") if f.is_file()}


def test_another_policy_is_refused(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("run", trainer__max_epochs=1) == 0
    other = save_llama(tmp_path / "other", seed=9)
    capsys.readouterr()
    assert fit("run", trainer__max_epochs=1, model__policy=other) == 1
    assert "policy: " in capsys.readouterr().err
    wider = save_llama(tmp_path / "wider", intermediate_size=128)
    assert fit("run", "--accept_changes", trainer__max_epochs=2, model__policy=wider) == 1
    assert "The checkpoint is of another model" in capsys.readouterr().err


def test_accepted_changes_apply_from_the_next_round_on(fit: Fit) -> None:
    assert fit("run", trainer__max_epochs=1) == 0
    before = list_shards("run")
    changed = {"rollout__sampling__temperature": 0.5, "model__loss__eta": 2.0}
    assert fit("run", "--accept_changes", **changed) == 0
    assert list_shards("run") | before == list_shards("run")
    settings = [stored.manifest["settings"]["responses"]["sampling"]["temperature"] for stored in
                RoundStore("run").rounds().values()]  # fmt: skip
    assert settings == [1.0, 0.5]


@pytest.mark.parametrize("kind", ["rounds/0000", "rounds/0001", "heldout/0000", "heldout/0001", "heldout/0002"])
def test_damaged_files_are_named_and_repaired_one_by_one(
    fit: Fit, counter: PromptCounter, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    assert fit("run") == 0
    before, held_out, model, sampled = (
        list_shards("run"),
        list_shards("run", "heldout"),
        read_export("run"),
        counter.prompts,
    )
    for stage in ("responses", "rewards", "pairs", "logps"):
        shards = sorted(Path("run", kind, stage).glob("*.parquet"))
        if shards:
            shards[-1].write_bytes(shards[-1].read_bytes()[:-20])
    Path("run", kind, "manifest.json").write_text('{"stages": {}}')
    capsys.readouterr()
    assert fit("run") == 1
    error = capsys.readouterr().err
    assert "manifest.json" in error
    assert "--repair" in error
    assert main(["rounds", "run", "--verify"]) == 1
    assert "damaged or missing" in capsys.readouterr().out
    assert fit("run", "--repair") == 0
    assert (list_shards("run"), list_shards("run", "heldout"), read_export("run")) == (before, held_out, model)
    assert counter.prompts == sampled + 2  # the prompts of one shard
    assert main(["rounds", "run", "--verify"]) == 0
    assert "repair: false" in Path("run/config.yaml").read_text()


def test_a_changed_shard_is_refused_when_it_is_read(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    """A shard of a trained round is not read again: the run continues, and `--verify` finds the damage."""

    def flip(stage: str) -> Path:
        shard = sorted(Path("run", stage).glob("*.parquet"))[-1]
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        return shard

    assert fit("run", trainer__max_epochs=1) == 0
    before = list_shards("run")
    flip("rounds/0000/responses")
    assert fit("run", trainer__max_epochs=2) == 0
    capsys.readouterr()
    assert main(["rounds", "run", "--verify"]) == 1
    read_again = flip("heldout/0000/rewards")  # read to measure the gain
    assert fit("run", trainer__max_epochs=3) == 1
    assert f"{read_again} is damaged" in capsys.readouterr().err
    assert fit("run", "--repair", trainer__max_epochs=3) == 0
    assert list_shards("run") | before == list_shards("run")
    assert main(["rounds", "run", "--verify"]) == 0


def test_a_foreign_shard_is_refused_and_moved_aside_and_the_real_one_restored(
    fit: Fit, counter: PromptCounter, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name has its own valid checksum, and sorts after the real shard or is the only one."""
    assert fit("run") == 0
    before, model, sampled = list_shards("run"), read_export("run"), counter.prompts
    own, other = (Path("run/rounds", name, "responses") for name in ("0001", "0000"))
    real, foreign = sorted(own.glob("00001-*"))[0], sorted(other.glob("00001-*"))[0]
    shutil.copy(foreign, own)
    assert fit("run") == 1
    error = capsys.readouterr().err
    assert f"not of this run: {own / foreign.name}" in error
    assert "--repair" in error
    real.unlink()
    assert main(["rounds", "run", "--verify"]) == 1
    assert fit("run", "--repair") == 0
    assert (list_shards("run"), read_export("run")) == (before, model)
    assert counter.prompts == sampled + 2  # the prompts of the real shard
    assert Path("run/set_aside/rounds/0001/responses", foreign.name).exists()


@pytest.mark.parametrize("missing", ["rounds/0000", "rounds/0001", "heldout"])
def test_missing_rounds_are_named_and_restored(fit: Fit, missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Rounds whose policy is the starting model or in a checkpoint."""
    assert fit("run") == 0
    before, held_out, model = list_shards("run"), list_shards("run", "heldout"), read_export("run")
    shutil.rmtree(Path("run", missing))
    assert fit("run") == 1
    assert f"missing: run/{missing}" in capsys.readouterr().err
    assert fit("run", "--repair") == 0
    assert (list_shards("run"), list_shards("run", "heldout"), read_export("run")) == (before, held_out, model)
    assert fit("run") == 0


def test_the_run_continues_without_a_round_whose_policy_is_gone(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("run", checkpoint__keep_rounds=1) == 0
    for folder in ("rounds/0001", "heldout/0001"):
        shutil.rmtree(Path("run", folder))
    assert fit("run", checkpoint__keep_rounds=1) == 1
    assert fit("run", "--repair", checkpoint__keep_rounds=1) == 0
    assert "run/rounds/0001 is lost; the run has trained on it and continues without it." in capsys.readouterr().out
    assert fit("run", trainer__max_epochs=3) == 0
    assert main(["rounds", "run", "--verify"]) == 0


def test_a_lost_manifest_is_restored_from_another_round(fit: Fit, counter: PromptCounter) -> None:
    assert fit("run") == 0
    before, sampled = list_shards("run"), counter.prompts
    for name in ("manifest.json", ".manifest.copy.json"):
        (Path("run/rounds/0001") / name).unlink()
    assert fit("run") == 1
    assert fit("run", "--repair") == 0
    assert (list_shards("run"), counter.prompts) == (before, sampled)


def test_scores_survive_a_failure_and_a_change_of_on_failure(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    import resume_rewards  # type: ignore[import-not-found]

    arguments = {"rollout__reward": "resume_rewards.nan_sometimes", "trainer__max_epochs": 1, "data__val_prompts": 0}
    arguments["data__prompts_per_round"] = 12
    resume_rewards.calls.clear()
    assert fit("run", **arguments) == 1
    assert "prompt_id 'p3'" in capsys.readouterr().err
    assert fit("run", rollout__scoring__on_failure="drop", **arguments) == 0
    scored = [call for call in resume_rewards.calls if call != "p3"]
    assert len(scored) == 6 + 11 * 3  # the trial calls, and every other response once
    stored = RoundStore("run").round(0)
    assert stored.info("rewards")["failures"] == {"not_finite": 3}
    assert stored.info("pairs")["dropped"]["not_scored"] == 1
    assert stored.read("rewards")["reward"].null_count == 3


@pytest.mark.parametrize("fault", ["truncated", "flipped", "garbage"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_is_used(
    fit: Fit, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    assert fit("run") == 0
    before, model = list_shards("run"), read_export("run")
    newest = Path("run/checkpoints/after-round-0002.ckpt")
    content = newest.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    newest.write_bytes({"truncated": content[:-100], "flipped": flipped, "garbage": b"nothing"}[fault])
    capsys.readouterr()
    assert fit("run") == 0
    out = capsys.readouterr().out
    assert "after-round-0002.ckpt is damaged; it is skipped." in out
    assert "Resuming from run/checkpoints/after-round-0001.ckpt" in out
    assert (list_shards("run"), read_export("run")) == (before, model)


def test_an_ended_run_keeps_one_checkpoint_and_says_what_that_rules_out(
    fit: Fit, counter: PromptCounter, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("run", checkpoint__keep_rounds=1) == 0
    before, model, sampled = list_shards("run"), read_export("run"), counter.prompts
    (kept,) = Path("run/checkpoints").glob("*-*.ckpt")
    assert fit("run", checkpoint__keep_rounds=1, model__loss__eta=3.0) == 1
    assert "--checkpoint.keep_rounds 2. Train further rounds" in (error := capsys.readouterr().err)
    assert "(--trainer.max_epochs 3)" in error
    kept.write_bytes(b"nothing")
    assert fit("run", checkpoint__keep_rounds=1) == 0
    assert "No other checkpoint is left: the run trains again from its start" in capsys.readouterr().out
    assert (list_shards("run"), read_export("run"), counter.prompts) == (before, model, sampled)
    assert fit("run", checkpoint__keep_rounds=1, model__loss__eta=3.0, trainer__max_epochs=3) == 0
    assert [file.name for file in Path("run/checkpoints").glob("*-*.ckpt")] == ["after-round-0003.ckpt"]


def test_an_earlier_checkpoint_moves_the_later_ones_aside(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("run") == 0
    before, model = list_shards("run"), read_export("run")
    assert fit("run", "--ckpt_path", "run/checkpoints/after-round-0001.ckpt") == 0
    assert "Later training is kept in run/checkpoints/superseded/after-round-0002.ckpt" in capsys.readouterr().out
    assert (list_shards("run"), read_export("run")) == (before, model)
    assert fit("run", "--ckpt_path", "run/config.yaml") == 1
    assert "is not a readable checkpoint" in capsys.readouterr().err


def test_the_rounds_command_only_reads(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rounds", "run"]) == 1
    assert "no folder" in capsys.readouterr().err
    assert fit("run") == 0
    everything = {str(f): f.stat().st_mtime_ns for f in Path("run").rglob("*")}
    capsys.readouterr()
    assert main(["rounds", "run"]) == 0
    text = capsys.readouterr().out
    assert text.count("complete") == 2 + 3
    assert main(["rounds", "run", "--round", "2", "--samples", "3"]) == 0
    text = capsys.readouterr().out
    assert text.count("What is ") == 3
    assert "responses.sampling" in text
    assert everything == {str(f): f.stat().st_mtime_ns for f in Path("run").rglob("*")}
    for wrong in (["--round", "7"], ["--samples", "2"], ["--round", "0"]):
        assert main(["rounds", "run", *wrong]) == 1
        assert capsys.readouterr().err.startswith("error: ")
