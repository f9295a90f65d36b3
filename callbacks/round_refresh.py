"""Prepares every round: weights to the sampler, answers, rewards, pairs, log-probs. Evaluates on held-out prompts."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor

from rlhf_pl.console import console, phase
from rlhf_pl.data.prompts import Prompt
from rlhf_pl.data.rounds import RoundDataModule, rounds_done
from rlhf_pl.errors import InputError
from rlhf_pl.fingerprints import prompts_fingerprint, weights_fingerprint
from rlhf_pl.metrics import held_out_metrics, round_metrics
from rlhf_pl.modules.rebel import RebelModule
from rlhf_pl.pairs import BestWorst, PairSelector
from rlhf_pl.prepare import generate, pair_logps, score, select
from rlhf_pl.rewards import Reward, Sample, as_reward
from rlhf_pl.rollout import EngineSpec, Sampler, SamplingConfig, VLLMSampler
from rlhf_pl.rollout.self_check import check_sampler, tolerance
from rlhf_pl.rounds import Round
from rlhf_pl.rows import RowBatch


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
        selector: Makes pairs of the scored answers.
        val_num_responses: Answers per held-out prompt; 2 or more also give held-out pairs for `val/loss`.
        val_temperature: Temperature on held-out prompts; null for that of training, 0 for the likeliest answer.
        prompts_per_shard: Prompts per file of the round store: what a crash can lose.
        logps_batch_tokens: Padded tokens per batch when log-probs are computed before training.
    """

    def __init__(
        self,
        reward: Reward | str | Callable[..., Any] | None = None,
        sampler: Sampler = VLLMSampler(),  # noqa: B008 - starts nothing; the command line shows it as the default
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
        selector: PairSelector = BestWorst(),  # noqa: B008 - stateless
        val_num_responses: int = 1,
        val_temperature: float | None = None,
        prompts_per_shard: int = 64,
        logps_batch_tokens: int = 4096,
    ) -> None:
        for name, value in (
            ("val_num_responses", val_num_responses),
            ("prompts_per_shard", prompts_per_shard),
            ("logps_batch_tokens", logps_batch_tokens),
        ):
            if value < 1:
                raise InputError(f"`rollout.{name}` must be 1 or more, got {value}.")
        if sampling.num_responses < 2:
            raise InputError(f"`rollout.sampling.num_responses` must be 2 or more, got {sampling.num_responses}.")
        self.reward = None if reward is None else as_reward(reward)
        self.sampler = sampler
        self.sampling = sampling
        self.val_sampling = replace(
            sampling,
            num_responses=val_num_responses,
            temperature=sampling.temperature if val_temperature is None else val_temperature,
        )
        self.selector = selector
        self.prompts_per_shard = prompts_per_shard
        self.logps_batch_tokens = logps_batch_tokens
        self._started = False
        self._synced: tuple[int, int] | None = None
        self._training_since, self._evaluation_seconds = time.monotonic(), 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check everything that needs no weights, and offer the DataModule to prepare its rounds."""
        if stage != "fit" or self.reward is None:
            return
        data = _datamodule(trainer)
        if not isinstance(pl_module, RebelModule):
            raise InputError(f"RoundRefresh works with RebelModule, got {type(pl_module).__name__}.")
        if trainer.world_size > 1:
            raise InputError(
                f"`trainer.devices`: rounds are prepared by one process so far, and this run has {trainer.world_size}. "
                "Set --trainer.devices 1."
            )
        self.sampler.check()
        longest = data.max_prompt_tokens + self.sampling.max_response_tokens
        if longest > pl_module.source.max_context_tokens:
            raise InputError(
                f"`data.max_prompt_tokens` + `rollout.sampling.max_response_tokens` = {data.max_prompt_tokens} + "
                f"{self.sampling.max_response_tokens} = {longest} is over the context of {pl_module.source.path!r}, "
                f"{pl_module.source.max_context_tokens} tokens. Lower one of them."
            )
        self.reward.check(_trial_samples(data.train_prompts))
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        trainer.num_sanity_val_steps = 0
        data.prepare_round = lambda index: self._prepare(trainer, pl_module, index)

    def _prepare(self, trainer: L.Trainer, module: RebelModule, index: int) -> None:
        """Make round `index`, or what is missing of it."""
        data = _datamodule(trainer)
        stored = data.store.round(index)
        if _inside_round(trainer):  # resumed: the policy is no longer the one that made the round
            if not stored.is_complete("logps"):
                raise InputError(f"The run was stopped while training on {stored.path}, whose files are gone.")
            return
        self._claim(stored, trainer, module, data.round_prompts(index), self.sampling)
        show = _shows_progress(trainer)
        if show:
            console.print(f"\n[bold]Round {index + 1} of {trainer.max_epochs}[/bold]")
        if data.val_prompts:
            metrics = self._evaluate(trainer, module, index)
            if index == 0:
                _log(trainer, metrics)
            with_pairs = self.val_sampling.num_responses > 1 and data.max_val_pairs > 0
            if with_pairs and not data.store.held_out(index).is_complete("logps"):
                self._make_pairs(trainer, module, data.store.held_out(index), "held-out", data.max_val_pairs)
        if not stored.is_complete("rewards"):
            self._answer(trainer, module, stored, data.round_prompts(index), self.sampling, "")
        if not stored.is_complete("logps"):
            self._make_pairs(trainer, module, stored, "pairs")
        _log(trainer, round_metrics(stored))
        self._rest()

    def _evaluate(self, trainer: L.Trainer, module: RebelModule, version: int) -> dict[str, float]:
        """Answers of the policy after `version` rounds to the held-out prompts: their metrics."""
        data = _datamodule(trainer)
        stored = data.store.held_out(version)
        started = time.monotonic()
        self._claim(stored, trainer, module, data.val_prompts, self.val_sampling)
        if not stored.is_complete("rewards"):
            self._answer(trainer, module, stored, data.val_prompts, self.val_sampling, "held-out ")
        self._evaluation_seconds += time.monotonic() - started
        return held_out_metrics(data.store, version)

    def _answer(
        self,
        trainer: L.Trainer,
        module: RebelModule,
        stored: Round,
        prompts: list[Prompt],
        sampling: SamplingConfig,
        what: str,
    ) -> None:
        show, data = _shows_progress(trainer), _datamodule(trainer)
        if not stored.is_complete("responses"):
            self._sync(trainer, module)
            with phase(f"answering {what}prompts", len(prompts), "prompts", show) as report:
                generate(
                    stored,
                    prompts,
                    self.sampler,
                    sampling,
                    module.source.tokenizer,
                    data.seed,
                    self.prompts_per_shard,
                    report,
                )
        with phase(f"scoring {what}answers", stored.info("responses")["responses"], "answers", show) as report:
            assert self.reward is not None
            score(stored, prompts, self.reward, report)

    def _make_pairs(
        self, trainer: L.Trainer, module: RebelModule, stored: Round, what: str, limit: int | None = None
    ) -> None:
        if not stored.is_complete("pairs"):
            select(stored, self.selector, _datamodule(trainer).seed, limit)
        rows = 2 * stored.info("pairs")["pairs"]
        with _for_inference(trainer, module):
            policies = {"old": _logps_function(trainer, trainer.model)}
            if module.kl_coef > 0:
                policies["reference"] = _logps_function(trainer, module.load_reference())
            with phase(f"log-probs of {what}", rows * len(policies), "answers", _shows_progress(trainer)) as report:
                temperature = stored.info("responses")["sampling"]["temperature"]
                pair_logps(stored, policies, self.logps_batch_tokens, temperature, report)

    def _sync(self, trainer: L.Trainer, module: RebelModule) -> None:
        """Bring the sampler to the policy's present weights, once per policy, and check that it has them."""
        now = (trainer.global_step, id(module.policy))
        if self._synced == now:
            return
        show = _shows_progress(trainer)
        if not self._started:
            with phase("starting the sampler", enabled=show):
                data = _datamodule(trainer)
                most = max(
                    self.sampling.num_responses * len(data.round_prompts(0)),
                    self.val_sampling.num_responses * len(data.val_prompts),
                )
                longest = max(len(p.token_ids) for p in [*data.train_prompts, *data.val_prompts])
                self.sampler.start(
                    EngineSpec(module.source, longest + self.sampling.max_response_tokens, max_sequences=most)
                )
            self._started = True
        started = time.monotonic()
        with phase("handing weights to the sampler", enabled=show):
            self.sampler.wake()
            self.sampler.load_weights(module.hf_state_dict().items())
            with _for_inference(trainer, module):
                prompts = _datamodule(trainer).train_prompts[:4]
                error = check_sampler(
                    self.sampler,
                    [p.token_ids for p in prompts],
                    _logps_function(trainer, trainer.model),
                    tolerance(_compute_dtype(trainer, module), getattr(self.sampler, "dtype", "float32")),
                )
        self._synced = now
        _log(trainer, {"time/sync_s": time.monotonic() - started, "rollout/sampler_logp_error": error})

    def _claim(
        self, stored: Round, trainer: L.Trainer, module: RebelModule, prompts: list[Prompt], sampling: SamplingConfig
    ) -> None:
        """Stamp the round with what it is made from; refuse a stored one that was made from something else."""
        data = _datamodule(trainer)
        settings = {
            "policy": module.source.path,
            "policy_step": trainer.global_step,
            "weights": weights_fingerprint(module.hf_state_dict()),
            "seed": data.seed,
            "prompts": prompts_fingerprint(prompts),
            "sampler": f"{type(self.sampler).__name__}({getattr(self.sampler, 'dtype', '')})",
            "sampling": vars(sampling),
            "prompts_per_shard": self.prompts_per_shard,
            "reward": self.reward.fingerprint() if self.reward else None,
            "selector": f"{type(self.selector).__name__}({vars(self.selector)})",
            "reference_logps": module.kl_coef > 0,
        }
        before = stored.manifest.get("settings")
        if before is None:
            counts = {
                "training": len(data.train_prompts),
                "held_out": len(data.val_prompts),
                "too_long": data.prompts_too_long,
                "in_round": len(prompts),
            }
            stored.update(settings=settings, prompts=counts)
        elif before != settings:
            changed = [f"  {k}: {before.get(k)} -> {v}" for k, v in settings.items() if before.get(k) != v]
            raise InputError(
                f"{stored.path} was made with other settings:\n" + "\n".join(changed) + "\nGive this run a directory "
                "of its own (--trainer.default_root_dir DIR), or delete that one."
            )

    def _rest(self) -> None:
        if self._started:
            self.sampler.sleep()
            # A sampler that slept has to be given its weights again.
            self._synced = None if torch.cuda.is_available() else self._synced

    def _evaluate_trained(self, trainer: L.Trainer, module: RebelModule) -> dict[str, float]:
        if self.reward is None or not _datamodule(trainer).val_prompts:
            return {}
        return self._evaluate(trainer, module, _datamodule(trainer).round_index + 1)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After a round's training: the new policy on the held-out prompts, where checkpoints can monitor it."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and isinstance(pl_module, RebelModule):
            pl_module.log_dict(self._evaluate_trained(trainer, pl_module))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same for runs without a validation loop; nothing is done twice."""
        assert isinstance(pl_module, RebelModule)
        data = _datamodule(trainer)
        version = rounds_done(trainer)
        if self.reward is not None and data.val_prompts and not data.store.held_out(version).is_complete("rewards"):
            pl_module.log_dict(self._evaluate(trainer, pl_module, version))
        self._rest()
        stored = data.store.round(version - 1)
        seconds = time.monotonic() - self._training_since - self._evaluation_seconds
        speed = stored.info("pairs")["pairs"] / seconds if stored.is_complete("pairs") else 0.0
        stored.complete(
            "training",
            seconds=seconds,
            loss=float(pl_module.round_loss.compute()),
            kl=float(trainer.callback_metrics["train/kl"]),
        )
        _log(trainer, {"time/train_s": seconds, "train/pairs_per_s": speed})

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training_since, self._evaluation_seconds = time.monotonic(), 0.0

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._started:
            self.sampler.close()
            self._started, self._synced = False, None


def _trial_samples(prompts: list[Prompt]) -> list[Sample]:
    """Real prompts with made-up answers, for the reward's check."""
    answers = ["Yes, of course. Here is what I would do.", "", "word " * 40]
    return [
        Sample(p.prompt_id, p.messages, text, (), finished, p.columns)
        for p in prompts[:2]
        for text, finished in zip(answers, (True, True, False), strict=True)
    ]


def _datamodule(trainer: L.Trainer) -> RoundDataModule:
    data: Any = getattr(trainer, "datamodule", None)
    if not isinstance(data, RoundDataModule):
        raise InputError(f"RoundRefresh works with RoundDataModule, got {type(data).__name__}.")
    return data


def _inside_round(trainer: L.Trainer) -> bool:
    progress: Any = trainer.fit_loop.epoch_progress.current
    return progress.started > progress.processed


def _shows_progress(trainer: L.Trainer) -> bool:
    return trainer.is_global_zero and trainer.progress_bar_callback is not None


def _log(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    """Straight to the loggers: preparation runs outside of the hooks in which `self.log` works."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)


def _logps_function(trainer: L.Trainer, policy: Any) -> Callable[[RowBatch, float], Tensor]:
    def logps(rows: RowBatch, temperature: float) -> Tensor:
        device = trainer.strategy.root_device
        with trainer.precision_plugin.forward_context():
            return policy(
                rows.input_ids.to(device), rows.attention_mask.to(device), rows.response_mask.to(device), temperature
            )

    return logps


def _compute_dtype(trainer: L.Trainer, module: RebelModule) -> str:
    return module.dtype_name if str(trainer.precision) == "32-true" else "bfloat16"


@contextmanager
def _for_inference(trainer: L.Trainer, module: RebelModule) -> Iterator[None]:
    """No gradients, eval mode; the mode is restored."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)
