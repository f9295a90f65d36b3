"""Prepares one round after the other: evaluates the policy, makes the round and logs its metrics."""

import lightning as L

from rlhf_pl.checkpointing.progress import is_at_round_end, is_inside_round
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.modules.logging import expose_metrics, publish_metrics
from rlhf_pl.rounds.disk_space import check_disk_space
from rlhf_pl.rounds.maker import RoundMaker
from rlhf_pl.rounds.metrics import NO_WIN_RATE, held_out_metrics, round_metrics, sync_metrics, training_metrics
from rlhf_pl.rounds.repair import repair
from rlhf_pl.utils.console import console
from rlhf_pl.utils.memory import resident_gib


class RoundPreparation:
    """Prepares rounds before they train, and evaluates the policy after the last one.

    Args:
        trainer: The run's Trainer.
        data: Reads the rounds.
        maker: Makes the rounds.
        repair: Whether to regenerate damaged files of the store first.
    """

    def __init__(self, trainer: L.Trainer, data: RoundDataModule, maker: RoundMaker, repair: bool) -> None:
        self.trainer, self.data, self.maker, self.repair = trainer, data, maker, repair
        self._is_store_ready = False
        self._announced: int | None = None
        self._logged_version: int | None = None
        self._logged_round: int | None = None

    def prepare(self, index: int) -> None:
        """Make the missing stages of round `index`, and evaluate the policy that generates it."""
        self._ready_store()
        maker, data, trainer = self.maker, self.data, self.trainer
        if index > 0 and data.store.round(index - 1).is_complete("training"):  # an earlier process may have done it
            expose_metrics(trainer, training_metrics(data.store.round(index - 1), data.passes_over))
        if is_inside_round(trainer):  # resumed: the policy is no longer the one that generated the round
            if not is_at_round_end(trainer):
                maker.stamps.check_inside(index)
            self._keep_metrics(index)
            return
        self._announce(index)
        maker.ranks.run_on_rank_zero(lambda: check_disk_space(trainer, maker.module, data, maker.options, index))
        self.evaluate(index)
        if maker.has_held_out_pairs:
            maker.make_held_out_pairs(index)
        stored = maker.make(index)
        if self._logged_round != index:  # after a resume Lightning requests the dataloader twice
            metrics = {
                **round_metrics(stored),
                **self._unlogged_sync_metrics(index),
                "system/resident_gib": resident_gib(),
            }
            publish_metrics(trainer, metrics, trainer.global_step)
            self._logged_round = index

    def finish(self, rounds: int) -> None:
        """Evaluate the policy of a finished run, or log the evaluation of an earlier process."""
        self.evaluate(rounds)
        if metrics := self._unlogged_sync_metrics(rounds):
            publish_metrics(self.trainer, metrics, self.trainer.global_step)

    def evaluate(self, version: int) -> None:
        """Evaluate the policy after `version` rounds on the held-out prompts, if there are any, and log it once."""
        self._ready_store()
        if not self.data.val_prompts:
            return
        self.maker.evaluate(version)
        metrics = held_out_metrics(self.data.store, version)
        if self._logged_version != version:
            publish_metrics(self.trainer, metrics, max(0, self.trainer.global_step - 1))
            self._logged_version = version
        expose_metrics(self.trainer, NO_WIN_RATE | metrics)

    def _ready_store(self) -> None:
        """Repair and tidy the store, once, after weights are restored."""
        if self._is_store_ready:
            return
        self._is_store_ready = True
        if self.repair:
            repair(self.maker)
        self.maker.ranks.run_on_rank_zero(self.data.store.clean_up)

    def _announce(self, index: int) -> None:
        trainer = self.trainer
        if self._announced != index and trainer.progress_bar_callback is not None and trainer.is_global_zero:
            of = "" if trainer.max_epochs == -1 else f" of {trainer.max_epochs}"
            console.print(f"\nRound {index + 1}{of}", style="bold")
            self._announced = index

    def _keep_metrics(self, index: int) -> None:
        """Let callbacks monitor the round's metrics, which an earlier process has logged."""
        data = self.data
        metrics = {**round_metrics(data.store.round(index)), **sync_metrics(data.store, index)}
        expose_metrics(self.trainer, {**metrics, "system/resident_gib": resident_gib()})
        if data.val_prompts and data.store.held_out(index).is_complete("rewards"):
            expose_metrics(self.trainer, NO_WIN_RATE | held_out_metrics(data.store, index))

    def _unlogged_sync_metrics(self, index: int) -> dict[str, float]:
        """Metrics of the sync before round `index`, where an earlier process made it and this one has logged none."""
        is_logged = "rollout/sampler_logp_error" in self.trainer.callback_metrics
        return {} if is_logged else sync_metrics(self.data.store, index)
