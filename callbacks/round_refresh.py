"""Prepares a round when Lightning requests its dataloader, and evaluates the policy after every round."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import lightning as L

from rlhf_pl.algorithms.pair_selection import BestWorst, PairSelector
from rlhf_pl.algorithms.reward_shaping import RewardShaping
from rlhf_pl.callbacks.round_checkpoint import save_resume_point
from rlhf_pl.callbacks.run_lifecycle import RunLifecycle
from rlhf_pl.callbacks.stop_on_signal import listen_for_signals
from rlhf_pl.checkpointing.checkpoints import Progress
from rlhf_pl.checkpointing.progress import has_stopped_inside, is_at_round_end, rounds_done
from rlhf_pl.data.compatibility import check_policy_module
from rlhf_pl.data.policy_module import as_lightning, is_policy_module
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.data.run_limits import (
    get_limits,
    stop_at_max_steps,
    stop_inside_round,
    suspend_monitors,
    take_over_limits,
)
from rlhf_pl.distributed.ranks import DEFAULT_TIMEOUT, ranks_of
from rlhf_pl.modules.logging import publish_metrics
from rlhf_pl.modules.trainer_options import check_trainer
from rlhf_pl.rewards import Reward, ScoringConfig, as_reward
from rlhf_pl.rewards.combine import isolate_functions
from rlhf_pl.rewards.stored import StoredReward
from rlhf_pl.rollout import Sampler, SamplingConfig, VLLMSampler
from rlhf_pl.rollout.weight_sync.sync import SamplerSync
from rlhf_pl.rounds.logps_check import check_first_update
from rlhf_pl.rounds.logps_origins import check_old_logps, check_sampler_logps, check_token_logps, has_foreign_pi_old
from rlhf_pl.rounds.maker import RoundMaker
from rlhf_pl.rounds.metrics import training_metrics
from rlhf_pl.rounds.preparation import RoundPreparation
from rlhf_pl.rounds.refill import check_refill
from rlhf_pl.rounds.settings import (
    RoundOptions,
    check_responses,
    check_shaping,
    held_out_sampling,
    pair_selector,
)
from rlhf_pl.rounds.start_checks import check_context, check_reward, check_round_monitors, check_sampling
from rlhf_pl.rounds.stored_rounds import StoredRounds
from rlhf_pl.rounds.stored_start import check_before_weights, check_first_policy, open_rounds
from rlhf_pl.store.check import find_problems
from rlhf_pl.utils.errors import InputError, check_at_least, check_finite


class RoundRefresh(RunLifecycle):
    """Prepares a round when Lightning requests its dataloader, and evaluates the policy on the held-out prompts.

    A round: the policy's weights are synced to the sampler and checked there; the sampler samples responses to the
    round's prompts; the reward scores them; the selector selects pairs; the policy's own log-probs of the pairs are
    stored. Stages that are already on disk are kept. This callback is the `RoundSource` of the RoundDataModule.

    Args:
        reward: A `Reward`, or a Python function, in a config by its import path: `package.module.function` or
            `file.py:function`. With null no rounds are made: the run directory's store must have them, or
            `--rounds_from` names a run that has them.
        sampler: Samples the responses.
        sampling: How responses are sampled for training.
        scoring: How the reward is called: time limit, retries, what to do about failures.
        shaping: Penalties on scores, and their normalisation, before pairs are selected.
        selector: Selects pairs of scored responses; null for `BestWorst`. Refused where the loss is not pairwise.
        refill: Maximum number of times that a round samples further prompts in place of those without a pair, or, where
            the loss is on groups, without a difference in (shaped) reward: each time as many of the next prompts as are
            missing from `data.prompts_per_round` usable ones. 0 for never. Refused where every round samples all
            prompts.
        drop_truncated: Train on no prompt of which any response was truncated at the length limit; such prompts are
            counted. Held-out pairs leave them out as well; held-out rewards do not.
        val_num_responses: Responses per held-out prompt; 2 or more also give held-out pairs for `val/loss`. null for 2,
            or for more, up to 8, where there are fewer than 32 held-out prompts, and so 64 responses or nearly; for 1
            with a `val_temperature` of 0.
        val_temperature: Temperature on held-out prompts; null for that of training, 0 for greedy decoding.
        prompts_per_shard: Prompts per file of the round store, sampled together: the most that a crash can lose. null
            for 64 on CPUs and 1,024 on GPUs.
        stream_shards: Let the engine start prompts of the next file while the last responses of one are sampled. In
            half precision a run that was killed may then sample other responses than an uninterrupted run.
        logps_batch_tokens: Tokens per batch when log-probs of held-out pairs are computed, prompts counted once.
            Training pairs come in the training's own micro-batches.
        old_logps: Whose log-probs of the pairs count as those of pi_old: the `policy`'s own, from a forward pass; or
            the `sampler`'s, reported while it sampled, which cost nothing and are as exact as the sampler's dtype.
            Samplers report them at temperature 1 over the whole vocabulary, so they must sample in this way:
            temperature 1, without top_p, top_k, min_p or anything else that reshapes the distribution. The difference
            is measured on one batch and logged. Held-out pairs sampled at another `val_temperature`, or for a loss that
            needs the log-probs of every token, get the policy's own. Refused with `model.loss.correction`.
        store_token_logps: Also store pi_old's log-prob of every token (float32) of all scored responses, not only of
            those that the loss uses, so that any loss can train on the round later (`--rounds_from`). Costs a forward
            pass of the responses that are not used, and 4 bytes a token.
        evaluate: Whether responses to the held-out prompts are sampled and scored, before and after every round; null
            for yes, but no with `--rounds_from`, which else needs no sampler and no reward.
        timeout_minutes: In a run with several processes, minutes that a process waits for the others before the run
            ends with a message that names the late process and its phase.
    """

    epoch_name = "round"
    repair = False  # set by `--repair`: regenerate damaged files of the store
    progress: Progress | None = None  # of the checkpoint to resume from
    accept_changes = False  # set by `--accept_changes`: continue in a run directory made with other settings
    _rounds_from: str | None = None

    def __init__(
        self,
        reward: Reward | str | Callable[..., Any] | None = None,
        sampler: Sampler = VLLMSampler(),  # noqa: B008 - starts nothing; the command line shows it as the default
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
        scoring: ScoringConfig = ScoringConfig(),  # noqa: B008 - frozen
        shaping: RewardShaping = RewardShaping(),  # noqa: B008 - frozen
        selector: BestWorst | PairSelector | None = None,  # configs may give `min_margin` without a class
        refill: int = 0,
        drop_truncated: bool = False,
        val_num_responses: int | None = None,
        val_temperature: float | None = None,
        prompts_per_shard: int | None = None,
        stream_shards: bool = False,
        logps_batch_tokens: int = 4096,
        old_logps: Literal["policy", "sampler"] = "policy",
        store_token_logps: bool = False,
        evaluate: bool | None = None,
        timeout_minutes: float = DEFAULT_TIMEOUT,
    ) -> None:
        super().__init__()
        check_at_least(
            "rollout",
            val_num_responses=(val_num_responses, 1),
            prompts_per_shard=(prompts_per_shard, 1),
            logps_batch_tokens=(logps_batch_tokens, 1),
            refill=(refill, 0),
        )
        check_finite("rollout", timeout_minutes=timeout_minutes)
        if timeout_minutes <= 0:
            raise InputError(f"`rollout.timeout_minutes` must be above 0, got {timeout_minutes}.")
        if refill and reward is None:
            raise InputError(
                f"`rollout.refill` is {refill}, but without `rollout.reward` no prompts are sampled. Leave it out."
            )
        if old_logps == "sampler":
            check_sampler_logps(sampling)
        self._val_sampling = partial(held_out_sampling, num_responses=val_num_responses, temperature=val_temperature)
        self._make_options = partial(
            RoundOptions,
            scoring=scoring,
            sampling=sampling,
            val_sampling=self._val_sampling(sampling),  # until the number of held-out prompts is known
            shaping=shaping,
            selector=selector,
            prompts_per_shard=prompts_per_shard,
            stream_shards=stream_shards,
            refill=refill,
            drop_truncated=drop_truncated,
            logps_batch_tokens=logps_batch_tokens,
            old_logps=old_logps,
            store_token_logps=store_token_logps,
        )
        self.options: RoundOptions | None = None
        if reward is not None:
            self.options = self._make_options(reward=as_reward(reward))
            if scoring.isolate:
                isolate_functions(self.options.reward)
        self.evaluate, self.selector = evaluate, selector
        self._stored: StoredRounds | None = None
        self.sampler, self._sync = sampler, SamplerSync(sampler)
        self._timeout = timeout_minutes
        self._trainer: L.Trainer | None = None  # while its rounds are prepared
        self._rounds: RoundPreparation | None = None
        self._at_end = False  # resumed after a round's last update
        self._training_since = time.monotonic()

    @property
    def rounds_from(self) -> str | None:
        """Directory of the run whose responses and rewards are taken instead of sampling and scoring; None for none.

        The command line sets it by `--rounds_from`. Set it before the Trainer starts.
        """
        return self._rounds_from

    @rounds_from.setter
    def rounds_from(self, run_dir: str | None) -> None:
        if run_dir is None:
            return
        if self.evaluate and self.options is None:
            raise InputError("`rollout.evaluate` is true, which needs a `rollout.reward`. Give one, or leave it out.")
        reward = self.options.reward if self.evaluate and self.options is not None else StoredReward()
        self._rounds_from, self.options = str(run_dir), self._make_options(reward=reward, from_other_run=True)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check everything that needs no weights, and register as the DataModule's source of rounds."""
        if stage != "fit":
            return
        data = _datamodule(trainer)
        options = self.options = self.options_for(len(data.held_out))
        self._set_evaluation(data)
        check_trainer(trainer, in_rounds=True)
        check_round_monitors(trainer, pl_module, data, options)
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        trainer.num_sanity_val_steps = 0
        take_over_limits(trainer)
        ranks = ranks_of(trainer, self._timeout)
        self.choose_threads(trainer)
        if options is None:
            problems = find_problems(data.store, held_out=False, checksums=False)
            problems.refuse("Restore the files: rounds that were prepared elsewhere can't be made here.")
            others = [each for each in trainer.callbacks if each is not self]  # type: ignore[attr-defined]
            if not any(hasattr(each, "prepare_round") for each in others):  # a source that is yet to register
                data.check_ready()
            return
        check_policy_module(pl_module, data)
        assert is_policy_module(pl_module)
        pair_selector(pl_module, options)
        check_old_logps(pl_module, options)
        check_shaping(pl_module, options)
        check_refill(pl_module, data, options)
        check_token_logps(pl_module, options)
        given = options.sampling
        if self._rounds_from is not None:
            self._stored, sampling = open_rounds(trainer, pl_module, self._rounds_from, options)
            val_sampling = self._val_sampling(sampling, prompts=len(data.held_out))
            options = self.options = replace(options, sampling=sampling, val_sampling=val_sampling)
        check_responses(pl_module, options)
        data.max_response_tokens = options.sampling.max_response_tokens
        samples = not options.from_other_run or bool(data.val_prompts)
        if samples:
            check_sampling(trainer, pl_module, data, self.sampler, options)
        else:
            check_context(pl_module, data, options)
        if not self.repair:
            ranks.run_on_rank_zero(lambda: self._refuse_damage(data))
        if samples:
            check_reward(trainer, data, options)
        maker = RoundMaker(
            trainer,
            pl_module,
            data,
            self._sync,
            options,
            lambda metrics: publish_metrics(trainer, metrics, trainer.global_step),
            self.accept_changes,
            self._stored,
        )
        if (stored := self._stored) is not None:
            left_out = len(data.held_out) - len(data.val_prompts)
            ranks.run_on_rank_zero(lambda: check_before_weights(stored, maker, given, left_out))
        if not self.repair:
            maker.stamps.refuse_changes()
        self._trainer, self._rounds = trainer, RoundPreparation(trainer, data, maker, self.repair)
        data.prepare_with(self)

    def options_for(self, held_out: int) -> RoundOptions | None:
        """The options of a run with that number of held-out prompts; None without a reward."""
        if self.options is None:
            return None
        return replace(self.options, val_sampling=self._val_sampling(self.options.sampling, prompts=held_out))

    def _set_evaluation(self, data: RoundDataModule) -> None:
        """Let the DataModule leave out the held-out prompts where they are not sampled."""
        data.evaluates = self._rounds_from is None if self.evaluate is None else self.evaluate
        if self.evaluate and not data.held_out:
            raise InputError("`rollout.evaluate` is true, but there are no held-out prompts. Set `data.val_prompts`.")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the policy with that of stored rounds, while nothing is written yet; lock the run directory."""
        if self._stored is not None and self._rounds is not None:
            check_first_policy(self._stored, self._rounds.maker)
        super().on_fit_start(trainer, pl_module)

    def _refuse_damage(self, data: RoundDataModule) -> None:
        """Refuse missing, damaged or foreign files before any weights load; checksums are compared on reading."""
        started = None if self.progress is None else self.progress.rounds_done + self.progress.is_inside_round
        find_problems(data.store, started, bool(data.val_prompts), checksums=False).refuse()

    def prepare_round(self, index: int) -> None:
        """Make the missing stages of round `index`; the DataModule calls it when its dataloader is requested."""
        preparation = self._preparation()
        assert self._trainer is not None
        self.warn_of_overload(self._trainer)
        preparation.prepare(index)
        self._release_gpu()

    def finish_run(self, rounds: int) -> None:
        """Evaluate the policy of a finished run that was started again."""
        self._preparation().finish(rounds)

    def _preparation(self) -> RoundPreparation:
        """The preparation of rounds; from the first call on, signals are handled by this run."""
        assert self._rounds is not None
        assert self._trainer is not None
        listen_for_signals(self._trainer)
        return self._rounds

    def _release_gpu(self) -> None:
        """Release the GPU memory of sampler and reward, because the policy trains now."""
        self._sync.release_gpu()
        if self.options is not None:
            self.options.reward.release_gpu()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._at_end = is_at_round_end(trainer)
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training_since = time.monotonic()
        get_limits(trainer).trained = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a round's first update, check that the stored log-probs were the policy's own before it."""
        assert is_policy_module(pl_module)
        first, pl_module.first_logratio = pl_module.first_logratio, None
        if (
            first is not None
            and self.options is not None
            and not self.accept_changes
            and not has_foreign_pi_old(_datamodule(trainer).store.round(rounds_done(trainer)), pl_module.needs)
        ):
            check_first_update(trainer, pl_module, self.options, self.sampler, first)
        stop_inside_round(trainer, batch_idx)
        super().on_train_batch_end(trainer, as_lightning(pl_module), outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record a round's training, which RoundCheckpoint has saved, and evaluate the new policy."""
        assert is_policy_module(pl_module)
        if has_stopped_inside(trainer):
            save_resume_point(trainer)
            suspend_monitors(trainer)
            self._release_gpu()
            return
        data, version = _datamodule(trainer), rounds_done(trainer)
        stored = data.store.round(version - 1)
        seconds = time.monotonic() - self._training_since
        summary, was_resumed = pl_module.round_summary(), self._at_end
        self._at_end = False

        def record_training() -> None:
            if not (was_resumed and stored.is_complete("training")):  # else the process that trained has recorded it
                stored.complete("training", seconds=seconds, **summary)

        ranks_of(trainer).run_on_rank_zero(record_training)
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)  # an engine on the same device needs the memory
        publish_metrics(trainer, training_metrics(stored, data.passes_over), max(0, trainer.global_step - 1))
        if self._rounds is not None:
            self._rounds.evaluate(version)
        self._release_gpu()
        stop_at_max_steps(trainer)

    def end(self) -> None:
        """Close the sampler and the reward, and release the run directory."""
        self._sync.close()
        if self.options is not None:
            self.options.reward.close()
        self._rounds = self._trainer = self._stored = None
        super().end()


def _datamodule(trainer: L.Trainer) -> RoundDataModule:
    data: Any = getattr(trainer, "datamodule", None)
    if not isinstance(data, RoundDataModule):
        raise InputError(f"RoundRefresh works with RoundDataModule, got {type(data).__name__}.")
    return data
