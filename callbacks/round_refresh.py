"""Has every round made when its loader is asked for, and the policy evaluated after every round."""

import time
from collections.abc import Callable, Hashable
from typing import Any, Literal

import lightning as L

from rlhf_pl.algorithms.pair_selection import BestWorst, PairSelector
from rlhf_pl.algorithms.reward_shaping import RewardShaping
from rlhf_pl.callbacks.round_checkpoint import RoundCheckpoint, save_resume_point
from rlhf_pl.checkpointing.checkpoints import Progress
from rlhf_pl.checkpointing.progress import at_rounds_end, inside_round, leaves_inside, rounds_done, stopped_inside
from rlhf_pl.data.prompts import Prompt
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.data.run_limits import (
    limits_of,
    report_stop,
    return_limits,
    return_monitors,
    set_monitors_aside,
    stop_at_max_steps,
    stop_inside_round,
    take_limits,
)
from rlhf_pl.distributed.ranks import DEFAULT_TIMEOUT, forget_ranks, ranks_of, report_failure
from rlhf_pl.modules.logging import keep, publish
from rlhf_pl.modules.monitors import check_monitors
from rlhf_pl.modules.pairwise import RebelModule
from rlhf_pl.modules.trainer_options import check_trainer
from rlhf_pl.rewards import Reward, Sample, ScoringConfig, as_reward
from rlhf_pl.rewards.combine import isolate_functions
from rlhf_pl.rewards.guard import try_reward
from rlhf_pl.rollout import Sampler, SamplingConfig, VLLMSampler
from rlhf_pl.rollout.weight_sync.sync import SamplerSync
from rlhf_pl.rounds.disk_space import check_room
from rlhf_pl.rounds.maker import RoundMaker
from rlhf_pl.rounds.metrics import held_out_metrics, metric_names, round_metrics, sync_metrics, training_metrics
from rlhf_pl.rounds.policy_kl import has_reference
from rlhf_pl.rounds.repair import repair
from rlhf_pl.rounds.settings import RoundOptions, check_noted_logps, held_out_sampling
from rlhf_pl.store.check import find_problems
from rlhf_pl.utils.console import console
from rlhf_pl.utils.errors import InputError, at_least, finite
from rlhf_pl.utils.lock import RunLock
from rlhf_pl.utils.memory import resident_gib

_LACKING = (
    "Metrics of answers come from held-out prompts: set `data.val_prompts`. Those of held-out pairs also need "
    "`rollout.val_num_responses` of 2 or more."
)

_MAX_KINDS = 64  # of conversations that a reward is checked with, each with three answers


class RoundRefresh(L.Callback):
    """Prepares a round when its loader is asked for, and evaluates the policy on the held-out prompts.

    A round: the policy's weights go to the sampler and are checked there; the sampler answers the round's prompts;
    the reward scores the answers; the selector makes pairs; the policy's own log-probs of the pairs are stored.
    What is already on disk is not made again.

    Args:
        reward: A `Reward`, or a Python function, in a config by its import path: `package.module.function` or
            `file.py:function`.
            With null nothing is prepared: the run directory's store must hold the rounds.
        sampler: Draws the answers.
        sampling: How answers are drawn for training.
        scoring: How the reward is called: time limit, retries, what to do about failures.
        shaping: Penalties on scores, and their normalisation, before pairs are made.
        selector: Makes pairs of the scored answers.
        val_num_responses: Answers per held-out prompt; 2 or more also give held-out pairs for `val/loss`.
        val_temperature: Temperature on held-out prompts; null for that of training, 0 for the likeliest answer.
        prompts_per_shard: Prompts per file of the round store, answered together: what a crash can lose. null for 64 on
            CPUs and 1,024 on GPUs.
        stream_shards: Let the engine take prompts of the next file while the last answers of one are drawn. In half
            precision a run that was killed then may draw other answers than one that was not.
        logps_batch_tokens: Tokens per batch when log-probs of held-out pairs are computed, prompts counted once. Pairs
            that train come in the training's own micro-batches.
        old_logps: Whose log-probs of the pairs count as those of the policy that generated them: the `policy`'s own,
            from a forward pass; or the `sampler`'s, noted while it drew, which costs nothing and is as exact as the
            sampler's dtype. Samplers note them at temperature 1 over the whole vocabulary, so that must be how they
            draw: temperature 1, without top_p, top_k, min_p or anything else that reshapes the distribution. The
            difference is measured on one batch and logged. Held-out pairs drawn at another `val_temperature` get the
            policy's own.
        timeout_minutes: In a run of several processes, minutes that one waits for the others before the run is ended
            with a message that names who is late, and where.
    """

    repair = False  # set by `--repair`: make damaged files of the store again
    progress: Progress | None = None  # of the checkpoint to go on from
    accept_changes = False  # set by `--accept_changes`: go on in a run directory made with other settings

    def __init__(
        self,
        reward: Reward | str | Callable[..., Any] | None = None,
        sampler: Sampler = VLLMSampler(),  # noqa: B008 - starts nothing; the command line shows it as the default
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
        scoring: ScoringConfig = ScoringConfig(),  # noqa: B008 - frozen
        shaping: RewardShaping = RewardShaping(),  # noqa: B008 - frozen
        selector: PairSelector = BestWorst(),  # noqa: B008 - stateless
        val_num_responses: int = 1,
        val_temperature: float | None = None,
        prompts_per_shard: int | None = None,
        stream_shards: bool = False,
        logps_batch_tokens: int = 4096,
        old_logps: Literal["policy", "sampler"] = "policy",
        timeout_minutes: float = DEFAULT_TIMEOUT,
    ) -> None:
        at_least(
            "rollout",
            val_num_responses=(val_num_responses, 1),
            prompts_per_shard=(prompts_per_shard, 1),
            logps_batch_tokens=(logps_batch_tokens, 1),
        )
        finite("rollout", timeout_minutes=timeout_minutes)
        if timeout_minutes <= 0:
            raise InputError(f"`rollout.timeout_minutes` must be above 0, got {timeout_minutes}.")
        if sampling.num_responses < 2:
            raise InputError(f"`rollout.sampling.num_responses` must be 2 or more, got {sampling.num_responses}.")
        if old_logps == "sampler":
            check_noted_logps(sampling)
        self.options: RoundOptions | None = None
        if reward is not None:
            self.options = RoundOptions(
                reward=as_reward(reward),
                scoring=scoring,
                sampling=sampling,
                val_sampling=held_out_sampling(sampling, val_num_responses, val_temperature),
                shaping=shaping,
                selector=selector,
                prompts_per_shard=prompts_per_shard,
                stream_shards=stream_shards,
                logps_batch_tokens=logps_batch_tokens,
                old_logps=old_logps,
            )
            if scoring.isolate:
                isolate_functions(self.options.reward)
        self._link = SamplerSync(sampler)
        self._timeout = timeout_minutes
        self._maker: RoundMaker | None = None
        self._begun = False
        self._lock: RunLock | None = None
        self._announced: int | None = None
        self._logged_version: int | None = None
        self._logged_round: int | None = None
        self._at_end = False  # resumed after a round's last update
        self._training_since = time.monotonic()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check everything that needs no weights, and offer the DataModule to prepare its rounds."""
        if stage != "fit":
            return
        data, options = _datamodule(trainer), self.options
        check_trainer(trainer, in_rounds=True)
        check_monitors(trainer, pl_module, self._validates(trainer), self._metrics(trainer), _LACKING)
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        trainer.num_sanity_val_steps = 0
        take_limits(trainer)
        if options is None:
            problems = find_problems(data.store, held_out=False)
            problems.refuse("Put the files right: what was prepared elsewhere can't be made here.")
            return
        if not isinstance(pl_module, RebelModule):
            raise InputError(f"RoundRefresh works with RebelModule, got {type(pl_module).__name__}.")
        ranks = ranks_of(trainer, self._timeout)
        if trainer.world_size % self._link.sampler.ranks_per_engine:
            raise InputError(
                f"`rollout.sampler`: engines of {self._link.sampler.ranks_per_engine} ranks each do not divide the "
                f"{trainer.world_size} ranks of this run. Change tensor_parallel_size or the number of devices."
            )
        self._link.sampler.check()
        data.max_response_tokens = options.sampling.max_response_tokens
        longest = data.max_prompt_tokens + data.max_response_tokens
        if options.old_logps == "sampler":
            check_noted_logps(options.sampling, self._link.sampler.reshapes())
        if longest > pl_module.source.max_context_tokens:
            raise InputError(
                f"`data.max_prompt_tokens` + `rollout.sampling.max_response_tokens` = {data.max_prompt_tokens} + "
                f"{options.sampling.max_response_tokens} = {longest} is over the context of {pl_module.source.path!r}, "
                f"{pl_module.source.max_context_tokens} tokens. Lower one of them."
            )
        self._link.sampler.check_rotary(pl_module.source.config, data.longest_tokens)
        if options.reward.by_prompt and data.val_prompts and options.val_sampling.num_responses < 2:
            raise InputError(
                f"`rollout.val_num_responses` must be 2 or more: {options.reward.name} compares a prompt's answers "
                "with each other, on held-out prompts too."
            )
        if not self.repair:
            ranks.run_on_rank_zero(lambda: self._refuse_damage(data))
        trial = _trial_samples([*data.train_prompts, *data.val_prompts])
        ranks.run_on_rank_zero(lambda: try_reward(options.reward, trial, options.scoring))
        self._maker = RoundMaker(
            trainer,
            pl_module,
            data,
            self._link,
            options,
            lambda metrics: publish(trainer, metrics, trainer.global_step),
            self.accept_changes,
        )
        if not self.repair:
            self._maker.refuse_changes()
        data.prepare_round = lambda index: self._prepare(trainer, index)
        data.finish_run = lambda rounds: self._finish(trainer, rounds)

    def _refuse_damage(self, data: RoundDataModule) -> None:
        """Read the whole store once, so that damage is found before anything is built on it."""
        begun = None if self.progress is None else self.progress.rounds_done + self.progress.inside_round
        find_problems(data.store, begun, bool(data.val_prompts)).refuse()

    def _validates(self, trainer: L.Trainer) -> bool:
        """Whether the module is validated on held-out pairs."""
        data = _datamodule(trainer)
        pairs = self.options is None or (data.val_prompts and self.options.val_sampling.num_responses > 1)
        return bool(pairs) and data.max_val_pairs > 0 and trainer.limit_val_batches != 0

    def _metrics(self, trainer: L.Trainer) -> list[str]:
        """Names of what is measured of rounds."""
        options, module = self.options, trainer.lightning_module
        if options is None or not isinstance(module, RebelModule):
            return []
        return metric_names(options, has_reference(module), bool(_datamodule(trainer).val_prompts))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on the run directory is written to, by this process alone."""
        self._lock = RunLock(trainer.default_root_dir)
        ranks_of(trainer).run_on_rank_zero(self._lock.acquire)

    def _begin(self, trainer: L.Trainer) -> RoundMaker:
        """The maker of this run's rounds, once weights are restored."""
        assert self._maker is not None
        if not self._begun:
            self._begun = True
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, RoundCheckpoint):
                    callback.listen()
            if self.repair:
                repair(self._maker)
            ranks_of(trainer).run_on_rank_zero(_datamodule(trainer).store.tidy)
        return self._maker

    def _prepare(self, trainer: L.Trainer, index: int) -> None:
        """Make round `index`, or what is missing of it."""
        maker, data = self._begin(trainer), _datamodule(trainer)
        if index > 0 and data.store.round(index - 1).is_complete("training"):  # perhaps by an earlier process
            keep(trainer, training_metrics(data.store.round(index - 1), data.passes))
        if inside_round(trainer):  # resumed: the policy is no longer the one that made the round
            if not at_rounds_end(trainer):
                maker.check_inside(index)
            self._keep_metrics(trainer, index)
            return
        if self._announced != index and trainer.progress_bar_callback is not None and trainer.is_global_zero:
            of = "" if trainer.max_epochs == -1 else f" of {trainer.max_epochs}"
            console.print(f"\nRound {index + 1}{of}", style="bold")
            self._announced = index
        maker.ranks.run_on_rank_zero(lambda: check_room(trainer, maker.module, data, maker.options.sampling, index))
        self._evaluate(trainer, index)
        if maker.pairs_held_out:
            maker.pair_held_out(index)
        stored = maker.make(index)
        if self._logged_round != index:  # after a resume Lightning asks for the loader twice
            metrics = {**round_metrics(stored), **self._of_sync(trainer, index), "system/resident_gib": resident_gib()}
            publish(trainer, metrics, trainer.global_step)
            self._logged_round = index
        self._rest()

    def _keep_metrics(self, trainer: L.Trainer, index: int) -> None:
        """Metrics that an earlier process logged of the round, for callbacks that monitor them."""
        data = _datamodule(trainer)
        of_round = {**round_metrics(data.store.round(index)), **sync_metrics(data.store, index)}
        keep(trainer, {**of_round, "system/resident_gib": resident_gib()})
        if data.val_prompts and data.store.held_out(index).is_complete("rewards"):
            keep(trainer, held_out_metrics(data.store, index))

    def _finish(self, trainer: L.Trainer, rounds: int) -> None:
        """Evaluate the policy of a finished run, or log what an earlier process measured."""
        self._begin(trainer)
        self._evaluate(trainer, rounds)
        if metrics := self._of_sync(trainer, rounds):
            publish(trainer, metrics, trainer.global_step)

    def _of_sync(self, trainer: L.Trainer, index: int) -> dict[str, float]:
        """Metrics of the sync before round `index`, where an earlier process has logged them."""
        is_logged = "rollout/sampler_logp_error" in trainer.callback_metrics
        return {} if is_logged else sync_metrics(_datamodule(trainer).store, index)

    def _rest(self) -> None:
        """The policy trains now: sampler and reward leave the device to it."""
        self._link.release_gpu()
        if self.options is not None:
            self.options.reward.release_gpu()

    def _evaluate(self, trainer: L.Trainer, version: int) -> dict[str, float]:
        """Metrics of the policy after `version` rounds on the held-out prompts; logged once."""
        data = _datamodule(trainer)
        if not data.val_prompts:
            return {}
        maker = self._begin(trainer)
        maker.evaluate(version)
        metrics = held_out_metrics(data.store, version)
        if self._logged_version != version:
            publish(trainer, metrics, max(0, trainer.global_step - 1))
            self._logged_version = version
        keep(trainer, metrics)
        return metrics

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._at_end = at_rounds_end(trainer)
        if not self._at_end:
            stop_at_max_steps(trainer)  # which a resumed run may have reached

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training_since = time.monotonic()
        limits_of(trainer).trained = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a round's first update: before it the policy must have been the one whose log-probs are stored."""
        assert isinstance(pl_module, RebelModule)
        first, pl_module.first_logratio = pl_module.first_logratio, None
        if first is not None and self._maker is not None and not self.accept_changes:
            self._maker.check_first_update(first)
        stop_inside_round(trainer, batch_idx)
        stop_at_max_steps(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if leaves_inside(trainer):
            set_monitors_aside(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        return_monitors(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After a round's training, which RoundCheckpoint has saved: note it, and evaluate the new policy."""
        assert isinstance(pl_module, RebelModule)
        if stopped_inside(trainer):
            save_resume_point(trainer)
            set_monitors_aside(trainer)
            self._rest()
            return
        data, version = _datamodule(trainer), rounds_done(trainer)
        stored = data.store.round(version - 1)
        seconds = time.monotonic() - self._training_since
        summary, noted = pl_module.round_summary(), self._at_end
        self._at_end = False

        def note() -> None:
            if not (noted and stored.is_complete("training")):  # by a process that came no further
                stored.complete("training", seconds=seconds, **summary)

        ranks_of(trainer).run_on_rank_zero(note)
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)  # an engine that wakes on the same device needs the room
        publish(trainer, training_metrics(stored, data.passes), max(0, trainer.global_step - 1))
        if self.options is not None:
            self._evaluate(trainer, version)
        self._rest()
        stop_at_max_steps(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        report_stop(trainer, "round")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end()
        return_limits(trainer)
        forget_ranks(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        report_failure(trainer, exception)
        self._end()
        return_limits(trainer)

    def _end(self) -> None:
        self._link.close()
        if self.options is not None:
            self.options.reward.close()
        self._maker, self._begun = None, False
        if self._lock is not None:
            self._lock.release()


def _trial_samples(prompts: list[Prompt]) -> list[Sample]:
    """Real prompts with made-up answers, for the reward's check: two, and one of every further kind of conversation."""
    answers = ["Yes, of course. Here is what I would do.", "", "word " * 40]
    kinds = {_kind(p): p for p in reversed(prompts)}
    chosen = {p.prompt_id: p for p in [*prompts[:2], *list(kinds.values())[:_MAX_KINDS]]}
    return [
        Sample(
            p.prompt_id,
            p.messages,
            text,
            (),
            finished,
            p.columns,
            tools=p.tools,
            chat_template_kwargs=p.chat_template_kwargs,
        )
        for p in chosen.values()
        for text, finished in zip(answers, (True, True, False), strict=True)
    ]


def _kind(prompt: Prompt) -> Hashable:
    """What templates tell conversations apart by: tools, roles with their keys, and who follows whom."""
    turns = frozenset((m["role"], type(m.get("content")), frozenset(m)) for m in prompt.messages)
    roles = [m["role"] for m in prompt.messages]
    return bool(prompt.tools), turns, frozenset(zip(["", *roles], roles, strict=False))


def _datamodule(trainer: L.Trainer) -> RoundDataModule:
    data: Any = getattr(trainer, "datamodule", None)
    if not isinstance(data, RoundDataModule):
        raise InputError(f"RoundRefresh works with RoundDataModule, got {type(data).__name__}.")
    return data
