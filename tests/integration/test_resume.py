"""What is done again when a run directory is used again: only what changed, what is damaged, or nothing."""

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


class Draws:
    """Counts the prompts that samplers answer, hand-over checks left out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts = 0
        plain = TransformersSampler.generate

        def generate(sampler: TransformersSampler, prompts: list, sampling: object):
            self.prompts += len(prompts) if prompts[0].seed > 1000 else 0
            return plain(sampler, prompts, sampling)

        monkeypatch.setattr(TransformersSampler, "generate", generate)


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Draws:
    return Draws(monkeypatch)


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
    }

    def run(folder: str, *arguments: str, **changes: object) -> int:
        settings = options | {name.replace("__", "."): value for name, value in changes.items()}
        listed = [str(text) for name, value in settings.items() for text in (f"--{name}", value)]
        return main(["fit", *listed, "--trainer.default_root_dir", folder, *arguments])

    return run


def files(folder: str, kind: str = "rounds") -> dict[str, list[str]]:
    """Shards by round and stage; their names hold checksums."""
    found: dict[str, list[str]] = {}
    for file in sorted((Path(folder) / kind).rglob("*.parquet")):
        found.setdefault(f"{file.parts[-3]}/{file.parts[-2]}", []).append(file.name)
    return found


def exported(folder: str) -> bytes:
    return (Path(folder) / "model" / "model.safetensors").read_bytes()


def changed_stages(before: dict[str, list[str]], after: dict[str, list[str]]) -> set[str]:
    return {stage for stage in before.keys() | after.keys() if before.get(stage) != after.get(stage)}


def test_a_finished_run_started_again_does_nothing(fit: Fit, draws: Draws, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("run") == 0
    before, model, drawn = files("run"), exported("run"), draws.prompts
    assert drawn == 2 * 8 + 3 * 4
    assert fit("run") == 0
    assert fit("run", "--ckpt_path", "last") == 0
    assert (files("run"), exported("run"), draws.prompts) == (before, model, drawn)
    assert "Going on from run/checkpoints/after-round-0002.ckpt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "stages", "says"),
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
def test_a_change_downstream_redoes_only_what_follows(
    fit: Fit, draws: Draws, capsys: pytest.CaptureFixture[str], change: dict[str, object], stages: set[str], says: str
) -> None:
    assert fit("run") == 0
    before, model, drawn = files("run"), exported("run"), draws.prompts
    capsys.readouterr()
    assert fit("run", **change) == 0
    assert says in " ".join(capsys.readouterr().out.split())
    assert changed_stages(before, files("run")) == {f"0001/{stage}" for stage in stages}
    assert draws.prompts == drawn + 4  # the newly trained policy answers the held-out prompts, and no others
    assert exported("run") != model
    assert len(list(Path("run/checkpoints/superseded").iterdir())) == 1
    # and once more changes nothing
    after = exported("run")
    assert fit("run", **change) == 0
    assert exported("run") == after


def test_a_round_trained_again_ends_as_if_it_had_been_trained_so_at_once(fit: Fit) -> None:
    """One round: the whole run follows from the starting policy."""
    assert fit("changed", trainer__max_epochs=1) == 0
    assert fit("changed", trainer__max_epochs=1, model__loss__eta=4.0, model__optimizer__lr=5e-4) == 0
    assert fit("direct", trainer__max_epochs=1, model__loss__eta=4.0, model__optimizer__lr=5e-4) == 0
    assert files("changed") == files("direct")
    assert exported("changed") == exported("direct")


def test_the_configs_learning_rate_counts_after_a_resume(fit: Fit) -> None:
    """A run that goes on with another rate uses it, though the checkpoint brings its own."""
    assert fit("run", trainer__max_epochs=1) == 0
    assert fit("run", trainer__max_epochs=2, model__optimizer__lr=0.0) == 0
    first, second = (RoundStore("run").held_out(v).manifest["settings"]["responses"]["weights"] for v in (1, 2))
    assert first == second


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rollout__sampling__temperature": 0.5}, "sampling.temperature: 1.0 -> 0.5"),
        ({"data__prompts_per_round": 4}, "prompts_per_round: 8 -> 4"),
        ({"data__system_prompt": "Be brief."}, "prompts: "),
        ({"seed_everything": 9}, "seed: 1 -> 9"),
    ],
)
def test_a_change_upstream_is_refused_with_the_choices(
    fit: Fit, capsys: pytest.CaptureFixture[str], change: dict[str, object], says: str
) -> None:
    assert fit("run", trainer__max_epochs=1) == 0
    everything = {str(f): f.stat().st_mtime_ns for f in Path("run").rglob("*") if f.is_file()}
    capsys.readouterr()
    assert fit("run", trainer__max_epochs=1, **change) == 1
    error = capsys.readouterr().err
    assert says in error
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


def test_accepted_changes_count_from_the_next_round_on(fit: Fit) -> None:
    assert fit("run", trainer__max_epochs=1) == 0
    before = files("run")
    changed = {"rollout__sampling__temperature": 0.5, "model__loss__eta": 2.0}
    assert fit("run", "--accept_changes", **changed) == 0
    assert files("run") | before == files("run")
    settings = [stored.manifest["settings"]["responses"]["sampling"]["temperature"] for stored in
                RoundStore("run").rounds().values()]  # fmt: skip
    assert settings == [1.0, 0.5]


@pytest.mark.parametrize("kind", ["rounds/0000", "rounds/0001", "heldout/0000", "heldout/0001", "heldout/0002"])
def test_damaged_files_are_named_and_repaired_one_by_one(
    fit: Fit, draws: Draws, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    assert fit("run") == 0
    before, held_out, model, drawn = files("run"), files("run", "heldout"), exported("run"), draws.prompts
    hurt = []
    for stage in ("responses", "rewards", "pairs", "logps"):
        shards = sorted(Path("run", kind, stage).glob("*.parquet"))
        if shards:
            shards[-1].write_bytes(shards[-1].read_bytes()[:-20])
            hurt.append(str(shards[-1]))
    Path("run", kind, "manifest.json").write_text('{"stages": {}}')
    capsys.readouterr()
    assert fit("run") == 1
    error = capsys.readouterr().err
    assert "manifest.json" in error
    assert "--repair" in error
    assert main(["rounds", "run", "--verify"]) == 1
    assert "damaged or missing" in capsys.readouterr().out
    assert fit("run", "--repair") == 0
    assert (files("run"), files("run", "heldout"), exported("run")) == (before, held_out, model)
    assert draws.prompts == drawn + 2  # the prompts of one shard
    assert main(["rounds", "run", "--verify"]) == 0
    assert "repair: false" in Path("run/config.yaml").read_text()


def test_a_shard_that_is_changed_inside_is_refused_where_it_is_read(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of a round that was trained on is not read again: the run goes on, and `--verify` finds it."""

    def flip(stage: str) -> Path:
        shard = sorted(Path("run", stage).glob("*.parquet"))[-1]
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        return shard

    assert fit("run", trainer__max_epochs=1) == 0
    before = files("run")
    flip("rounds/0000/responses")
    assert fit("run", trainer__max_epochs=2) == 0
    capsys.readouterr()
    assert main(["rounds", "run", "--verify"]) == 1
    read_again = flip("heldout/0000/rewards")  # to tell what was gained
    assert fit("run", trainer__max_epochs=3) == 1
    assert f"{read_again} is damaged" in capsys.readouterr().err
    assert fit("run", "--repair", trainer__max_epochs=3) == 0
    assert files("run") | before == files("run")
    assert main(["rounds", "run", "--verify"]) == 0


def test_a_foreign_shard_is_refused_moved_aside_and_the_real_one_made_again(
    fit: Fit, draws: Draws, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name carries its own checksum, and sorts after that of the real one or stands alone."""
    assert fit("run") == 0
    before, model, drawn = files("run"), exported("run"), draws.prompts
    own, others = (Path("run/rounds", name, "responses") for name in ("0001", "0000"))
    real, foreign = sorted(own.glob("00001-*"))[0], sorted(others.glob("00001-*"))[0]
    shutil.copy(foreign, own)
    assert fit("run") == 1
    error = capsys.readouterr().err
    assert f"not of this run: {own / foreign.name}" in error
    assert "--repair" in error
    real.unlink()
    assert main(["rounds", "run", "--verify"]) == 1
    assert fit("run", "--repair") == 0
    assert (files("run"), exported("run")) == (before, model)
    assert draws.prompts == drawn + 2  # the prompts of the real shard
    assert Path("run/set_aside/rounds/0001/responses", foreign.name).exists()


@pytest.mark.parametrize("gone", ["rounds/0000", "rounds/0001", "heldout"])
def test_rounds_that_are_gone_are_named_and_made_again(fit: Fit, gone: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of policies that are the starting model or in a checkpoint."""
    assert fit("run") == 0
    before, held_out, model = files("run"), files("run", "heldout"), exported("run")
    shutil.rmtree(Path("run", gone))
    assert fit("run") == 1
    assert f"missing: run/{gone}" in capsys.readouterr().err
    assert fit("run", "--repair") == 0
    assert (files("run"), files("run", "heldout"), exported("run")) == (before, held_out, model)
    assert fit("run") == 0


def test_the_run_goes_on_without_a_round_whose_policy_is_gone(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("run", checkpoint__keep_rounds=1) == 0
    for folder in ("rounds/0001", "heldout/0001"):
        shutil.rmtree(Path("run", folder))
    assert fit("run", checkpoint__keep_rounds=1) == 1
    assert fit("run", "--repair", checkpoint__keep_rounds=1) == 0
    assert "run/rounds/0001 is lost; the run has trained on it and goes on without it." in capsys.readouterr().out
    assert fit("run", trainer__max_epochs=3) == 0
    assert main(["rounds", "run", "--verify"]) == 0


def test_a_lost_manifest_is_made_from_its_neighbour(fit: Fit, draws: Draws) -> None:
    assert fit("run") == 0
    before, drawn = files("run"), draws.prompts
    for name in ("manifest.json", ".manifest.copy.json"):
        (Path("run/rounds/0001") / name).unlink()
    assert fit("run") == 1
    assert fit("run", "--repair") == 0
    assert (files("run"), draws.prompts) == (before, drawn)


def test_scores_survive_a_failure_and_a_change_of_the_policy_for_failures(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    import resume_rewards  # type: ignore[import-not-found]

    arguments = {"rollout__reward": "resume_rewards.nan_sometimes", "trainer__max_epochs": 1, "data__val_prompts": 0}
    arguments["data__prompts_per_round"] = 12
    resume_rewards.calls.clear()
    assert fit("run", **arguments) == 1
    assert "prompt_id 'p3'" in capsys.readouterr().err
    assert fit("run", rollout__scoring__on_failure="drop", **arguments) == 0
    scored = [call for call in resume_rewards.calls if call != "p3"]
    assert len(scored) == 6 + 11 * 3  # the trial, and every other answer once
    stored = RoundStore("run").round(0)
    assert stored.info("rewards")["failures"] == {"not_finite": 3}
    assert stored.info("pairs")["dropped"]["not_scored"] == 1
    assert stored.read("rewards")["reward"].null_count == 3


@pytest.mark.parametrize("harm", ["cut", "flip", "garbage"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_is_taken(
    fit: Fit, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    assert fit("run") == 0
    before, model = files("run"), exported("run")
    newest = Path("run/checkpoints/after-round-0002.ckpt")
    content = newest.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    newest.write_bytes({"cut": content[:-100], "flip": flipped, "garbage": b"nothing"}[harm])
    capsys.readouterr()
    assert fit("run") == 0
    out = capsys.readouterr().out
    assert "after-round-0002.ckpt is damaged; going on without it." in out
    assert "Going on from run/checkpoints/after-round-0001.ckpt" in out
    assert (files("run"), exported("run")) == (before, model)


def test_going_back_by_hand_puts_later_checkpoints_aside(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("run") == 0
    before, model = files("run"), exported("run")
    assert fit("run", "--ckpt_path", "run/checkpoints/after-round-0001.ckpt") == 0
    assert "Later training is kept in run/checkpoints/superseded/after-round-0002.ckpt" in capsys.readouterr().out
    assert (files("run"), exported("run")) == (before, model)
    assert fit("run", "--ckpt_path", "run/config.yaml") == 1
    assert "no readable checkpoint" in capsys.readouterr().err


def test_rounds_command(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
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
