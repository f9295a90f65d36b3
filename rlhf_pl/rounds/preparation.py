"""One round after the other: evaluates the policy, has the round made, and logs what was measured of it."""

import lightning as L

from rlhf_pl.checkpointing.progress import at_rounds_end, inside_round
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.modules.logging import keep, publish
from rlhf_pl.rounds.disk_space import check_room
from rlhf_pl.rounds.maker import RoundMaker
from rlhf_pl.rounds.metrics import held_out_metrics, round_metrics, sync_metrics, training_metrics
from rlhf_pl.rounds.repair import repair
from rlhf_pl.utils.console import console
from rlhf_pl.utils.memory import resident_gib


class RoundPreparation:
    """What is done before a round trains, and after the last one.

    Args:
        trainer: Of the run.
        data: Reads the rounds.
        maker: Makes them.
        mend: Make damaged files of the store again first.
    """

    def __init__(self, trainer: L.Trainer, data: RoundDataModule, maker: RoundMaker, mend: bool) -> None:
        self.trainer, self.data, self.maker, self.mend = trainer, data, maker, mend
        self._begun = False
        self._announced: int | None = None
        self._logged_version: int | None = None
        self._logged_round: int | None = None

    def prepare(self, index: int) -> None:
        """Make round `index`, or what is missing of it, and evaluate the policy that generates it."""
        self._begin()
        maker, data, trainer = self.maker, self.data, self.trainer
        if index > 0 and data.store.round(index - 1).is_complete("training"):  # perhaps by an earlier process
            keep(trainer, training_metrics(data.store.round(index - 1), data.passes))
        if inside_round(trainer):  # resumed: the policy is no longer the one that made the round
            if not at_rounds_end(trainer):
                maker.stamps.check_inside(index)
            self._keep_metrics(index)
            return
        self._announce(index)
        maker.ranks.run_on_rank_zero(lambda: check_room(trainer, maker.module, data, maker.options.sampling, index))
        self.evaluate(index)
        if maker.pairs_held_out:
            maker.pair_held_out(index)
        stored = maker.make(index)
        if self._logged_round != index:  # after a resume Lightning asks for the loader twice
            metrics = {**round_metrics(stored), **self._of_sync(index), "system/resident_gib": resident_gib()}
            publish(trainer, metrics, trainer.global_step)
            self._logged_round = index

    def finish(self, rounds: int) -> None:
        """Evaluate the policy of a finished run, or log what an earlier process measured."""
        self.evaluate(rounds)
        if metrics := self._of_sync(rounds):
            publish(self.trainer, metrics, self.trainer.global_step)

    def evaluate(self, version: int) -> None:
        """Measure the policy after `version` rounds on the held-out prompts, if there are any; logged once."""
        self._begin()
        if not self.data.val_prompts:
            return
        self.maker.evaluate(version)
        metrics = held_out_metrics(self.data.store, version)
        if self._logged_version != version:
            publish(self.trainer, metrics, max(0, self.trainer.global_step - 1))
            self._logged_version = version
        keep(self.trainer, metrics)

    def _begin(self) -> None:
        """Once, when weights are restored: put the store in order."""
        if self._begun:
            return
        self._begun = True
        if self.mend:
            repair(self.maker)
        self.maker.ranks.run_on_rank_zero(self.data.store.tidy)

    def _announce(self, index: int) -> None:
        trainer = self.trainer
        if self._announced != index and trainer.progress_bar_callback is not None and trainer.is_global_zero:
            of = "" if trainer.max_epochs == -1 else f" of {trainer.max_epochs}"
            console.print(f"\nRound {index + 1}{of}", style="bold")
            self._announced = index

    def _keep_metrics(self, index: int) -> None:
        """Metrics that an earlier process logged of the round, for callbacks that monitor them."""
        data = self.data
        of_round = {**round_metrics(data.store.round(index)), **sync_metrics(data.store, index)}
        keep(self.trainer, {**of_round, "system/resident_gib": resident_gib()})
        if data.val_prompts and data.store.held_out(index).is_complete("rewards"):
            keep(self.trainer, held_out_metrics(data.store, index))

    def _of_sync(self, index: int) -> dict[str, float]:
        """Metrics of the sync before round `index`, where an earlier process has logged them."""
        is_logged = "rollout/sampler_logp_error" in self.trainer.callback_metrics
        return {} if is_logged else sync_metrics(self.data.store, index)
