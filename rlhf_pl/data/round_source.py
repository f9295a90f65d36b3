"""What makes rounds before a DataModule reads them."""

from typing import Protocol


class RoundSource(Protocol):
    """Prepares the rounds that a DataModule serves; `PairsDataModule.prepare_with` takes one.

    `RoundRefresh` samples, scores and pairs responses; `OfflineLogps` adds log-probs to pairs that someone else made.
    Without a source the rounds must be in the run directory.
    """

    def prepare_round(self, index: int) -> None:
        """Write what is missing of round `index` to the run directory, from the policy as it is.

        All ranks call it together when Lightning requests the epoch's dataloader, once weights are restored. A round
        that is there stays as it is.

        Args:
            index: Of the round, from 0; always 0 where all epochs train on the same pairs.

        Raises:
            InputError: The round can't be made.
        """

    def finish_run(self, rounds: int) -> None:
        """Measure the policy of a finished run that was started again; nothing is trained.

        Args:
            rounds: Rounds whose training is done.
        """
