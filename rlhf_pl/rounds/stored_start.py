"""The start of a run that takes its rounds from another one: what is checked, and what is said."""

import lightning as L

from rlhf_pl.algorithms.prompt_groups import SAMPLING_LOGPS
from rlhf_pl.data.policy_module import PolicyModule
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.rollout import SamplingConfig
from rlhf_pl.rounds.logps_origins import check_other_runs_sampling, check_sampler_logps
from rlhf_pl.rounds.maker import RoundMaker
from rlhf_pl.rounds.settings import RoundOptions
from rlhf_pl.rounds.stored_checks import (
    check_files,
    check_rounds,
    check_stored_logps,
    list_unused,
    refuse_differences,
    refuse_other_start,
)
from rlhf_pl.rounds.stored_rounds import RECORD, StoredRounds, refuse_same_directory
from rlhf_pl.store.round_store import Round, RoundStore
from rlhf_pl.store.source_run import SourceRun
from rlhf_pl.utils.console import console, note


def open_rounds(
    trainer: L.Trainer, module: PolicyModule, rounds_from: str, options: RoundOptions
) -> tuple[StoredRounds, SamplingConfig]:
    """The rounds of another run, checked, and how they were sampled; all ranks call it.

    Raises:
        InputError: The directory is this run's own, has no rounds, or fewer than `trainer.max_epochs`; or
            `rollout.old_logps` or `model.loss.correction` does not fit how the responses were sampled.
    """
    rounds = StoredRounds(SourceRun(rounds_from), RoundStore(trainer.default_root_dir))

    def check() -> SamplingConfig:
        refuse_same_directory(rounds_from, trainer.default_root_dir)
        check_rounds(rounds, trainer.max_epochs)
        return rounds.sampling

    sampling = ranks_of(trainer).run_on_rank_zero(check)
    if options.old_logps == "sampler":
        check_sampler_logps(sampling)
    if SAMPLING_LOGPS in module.needs:
        check_other_runs_sampling(rounds_from, sampling)
    return rounds, sampling


def check_before_weights(rounds: StoredRounds, maker: RoundMaker, given: SamplingConfig, held_out: int) -> None:
    """Check what needs no weights, and say what is taken and what has no use; only rank 0 calls it.

    Args:
        rounds: The other run's rounds.
        maker: Makes this run's rounds from them.
        given: The sampling settings of this run's config, which the stored ones replace.
        held_out: Number of held-out prompts that are not evaluated.

    Raises:
        InputError: Settings contradict the stored rounds, or log-probs that the loss needs are missing there.
    """
    module, store = maker.module, maker.data.store
    if not rounds.has_begun:
        first = rounds.source.round(0)
        now = maker.stamps.settings(store.round(0), with_policy=False)["responses"]
        refuse_differences(first, module, Round.as_stored(now), maker.accept_changes)
    for index in range(maker.trainer.max_epochs or 0):
        if not rounds.is_copied(index):
            check_files(rounds.source.round(index), module)
            if index > 0:
                _check_logps(rounds, maker, index)
    _say_what_is_taken(rounds, maker, given, held_out)


def check_first_policy(rounds: StoredRounds, maker: RoundMaker) -> None:
    """Compare the policy that this run starts from with the one that sampled the first round; all ranks call it.

    Raises:
        InputError: They differ, and that is not accepted; or log-probs that the loss then needs are missing.
    """
    if maker.trainer.ckpt_path is not None:  # it has trained since
        return
    weights, first = maker.policy().fingerprint, maker.data.store.round(0)

    def check() -> None:
        begun = first.manifest.get(RECORD)
        if begun is not None and first.manifest["settings"]["responses"]["weights"] == weights:
            return  # what an earlier process has accepted
        made_by = begun or rounds.source.round(0).made_by
        differs = refuse_other_start(first.name, made_by, maker.module, weights, maker.accept_changes)
        if differs and begun is None:
            _check_logps(rounds, maker, 0)

    maker.ranks.run_on_rank_zero(check)


def _check_logps(rounds: StoredRounds, maker: RoundMaker, index: int) -> None:
    stored = maker.data.store.round(index)
    check_stored_logps(rounds.source.round(index), maker.module, maker.options, maker.data.seed, maker.ties(stored))


def _say_what_is_taken(rounds: StoredRounds, maker: RoundMaker, given: SamplingConfig, held_out: int) -> None:
    path = rounds.source.run_dir
    console.print(
        f"Responses and rewards come from {path} (run {rounds.run}): nothing is sampled for training or scored again, "
        "and `rollout.sampler`, `rollout.reward` and `rollout.scoring` have no use there.",
        soft_wrap=True,
    )
    if held_out:
        console.print(
            f"The {held_out} held-out prompts are not evaluated: --rollout.evaluate true samples responses to them "
            "with `rollout.sampler` and scores them with `rollout.reward`.",
            soft_wrap=True,
        )
    if not rounds.is_copied(0):
        first = rounds.source.round(0)
        lines = list_unused(given, rounds.sampling, (first.made_by["seed"], maker.data.seed))
        if lines:
            note(f"the settings of the stored responses are used: {'; '.join(lines)}.")
