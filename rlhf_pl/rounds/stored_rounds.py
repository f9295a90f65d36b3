"""Takes the responses and rewards of a run's rounds from another run (`--rounds_from`)."""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_pl.rollout import SamplingConfig
from rlhf_pl.rounds.stages.given import read_given
from rlhf_pl.store.manifest import parse_shard_number
from rlhf_pl.store.round_store import GIVEN, Round, RoundStore
from rlhf_pl.store.source_run import COPIED, SourceRound, SourceRun
from rlhf_pl.store.waves import REFILL
from rlhf_pl.utils.console import note
from rlhf_pl.utils.errors import InputError

RECORD = "rounds_from"  # entry of a round's manifest: where its responses and rewards come from


class StoredRounds:
    """Copies the responses and rewards of another run's rounds into this run, once; the other run is only read.

    Log-probs under the policy that sampled the responses are copied too, where the other run has them. The copy is
    complete in itself: once a round is copied, the other run may be gone.

    Args:
        source: The other run.
        store: This run's store.
    """

    def __init__(self, source: SourceRun, store: RoundStore) -> None:
        self.source, self.store = source, store
        self._noted = False

    def is_copied(self, index: int) -> bool:
        """Whether this run holds round `index` with its responses and rewards."""
        stored = self.store.round(index)
        return RECORD in stored.manifest and all(map(stored.is_complete, COPIED))

    @property
    def has_begun(self) -> bool:
        """Whether this run has begun to copy rounds."""
        return RECORD in self.store.round(0).manifest

    @cached_property
    def run(self) -> str:
        """Id of the other run.

        Raises:
            InputError: This run's rounds come from another run than the one that is given.
        """
        record = self.store.round(0).manifest.get(RECORD)
        if record is None:
            return self.source.identity
        path = self.source.run_dir
        is_same = self.source.identity == record["run"] if path.is_dir() else os.path.abspath(path) == record["path"]
        if not is_same:
            raise InputError(
                f"`--rounds_from` is {str(path)!r}, but the rounds in {self.store.run_dir} come from "
                f"{record['path']!r} (run {record['run']}). Name that one, or give this run a directory of its own "
                "(--trainer.default_root_dir DIR)."
            )
        return record["run"]

    @property
    def sampling(self) -> SamplingConfig:
        """How the responses of the first round were sampled."""
        first = self.store.round(0) if self.is_copied(0) else self.source.round(0)
        return SamplingConfig(**first.info("responses")["sampling"])

    def copy(self, stored: Round) -> None:
        """Copy what a round lacks; only rank 0 calls it.

        Raises:
            InputError: A file of the other run is missing or damaged.
        """
        record = stored.manifest.get(RECORD) or self._record(stored)
        missing = [stage for stage in record["files"] if not stored.is_complete(stage)]
        if not missing:
            return
        source = self._open(stored, record)
        for stage in missing:
            if stage == GIVEN:
                table = read_given(source)
                assert table is not None
                stored.write_shard(GIVEN, 0, table)
                stored.complete(GIVEN, responses=len(table))
            else:
                self._copy_stage(source, stored, stage, record["files"][stage])

    @staticmethod
    def _copy_stage(source: SourceRound, stored: Round, stage: str, names: list[str]) -> None:
        for name in names:
            number = parse_shard_number(name)
            if number not in stored.shards(stage, number):
                stored.write_shard_bytes(stage, number, source.read_bytes(stage, name))
        stored.complete(stage, **source.info(stage) | {"seconds": 0.0})

    def _open(self, stored: Round, record: dict[str, Any]) -> SourceRound:
        path = self.source.run_dir / record["round"]
        if not path.is_dir():
            raise InputError(f"`--rounds_from`: {path} is gone, and {stored.path} is not copied completely.")
        return SourceRound(Round(path))

    def _record(self, stored: Round) -> dict[str, Any]:
        """Write where a round comes from into its manifest, before anything is copied."""
        source = SourceRound(Round(self.source.run_dir / stored.name))
        if not source.is_scored:
            raise InputError(f"`--rounds_from`: responses and rewards of {source.stored.path} are not complete.")
        made_by, own = source.made_by, stored.manifest["settings"]["responses"]["weights"]
        is_first = int(stored.path.name) == 0
        off_policy = not is_first if made_by["weights"] is None else made_by["weights"] != own
        record = {
            "path": os.path.abspath(self.source.run_dir),
            "run": self.run,
            "round": stored.name,
            **made_by,
            "off_policy": off_policy,
            "files": {
                "responses": source.shards("responses"),
                **({} if read_given(source) is None else {GIVEN: source.shards("logps")}),
                "rewards": source.shards("rewards"),
            },
        }
        shard = source.manifest.get("prompts_per_shard", stored.manifest["prompts_per_shard"])
        refill = {name: source.manifest[name] | {"complete": True} for name in (REFILL,) if name in source.manifest}
        stored.update(**{RECORD: record}, prompts_per_shard=shard, **refill)
        return record

    def say_whose(self, stored: Round, reads_old: bool, corrects: bool = False) -> None:
        """Say once that a round is off-policy, and what that means.

        Args:
            stored: The round.
            reads_old: Whether the training uses log-probs under the policy that sampled it.
            corrects: Whether importance weights correct for the difference to it.
        """
        record = stored.manifest[RECORD]
        if self._noted or not record["off_policy"]:
            return
        self._noted = True
        used = (
            "pi_old is that policy: its log-probs are those stored there, and train/first_logratio, train/kl and "
            "train/ratio_* are relative to it"
            if reads_old
            else "the loss uses no log-probs of that policy"
        )
        if corrects:
            used = (
                "pi_old is this run's policy before the round, and `model.loss.correction` weights the responses by "
                "pi_old / that policy: train/sampling_weight and the metrics beside it tell how far apart they are"
            )
        note(
            f"round {int(stored.path.name) + 1} is off-policy: the policy of {record['path']} at its update "
            f"{record['policy_step']} (weights {record['weights']}) has sampled it, not this run's; {used}. This "
            "holds for all later rounds whose policy is not this run's."
        )


def is_off_policy(stored: Round) -> bool:
    """Whether a round was sampled by another policy than the one that this run trains on it."""
    return bool(stored.manifest.get(RECORD, {}).get("off_policy"))


def refuse_same_directory(rounds_from: str, run_dir: str | Path) -> None:
    """Refuse to train again in the directory that the rounds come from.

    Raises:
        InputError: Both are one directory.
    """
    if os.path.realpath(rounds_from) == os.path.realpath(run_dir):
        raise InputError(
            f"`--rounds_from` is {str(rounds_from)!r}, which is also this run's directory "
            f"(`trainer.default_root_dir` is {str(run_dir)!r}). Give this run a directory of its own: "
            "--trainer.default_root_dir DIR."
        )
