"""The protocol of objects that prepare rounds."""

from typing import Protocol


class RoundSource(Protocol):
    """Prepares the rounds that a DataModule serves; `PairsDataModule.prepare_with` takes one.

    `RoundRefresh` samples, scores and pairs responses. `OfflineLogps` adds log-probs to pairs that were made elsewhere.
    Without a source, the rounds must be in the run directory.
    """

    def prepare_round(self, index: int) -> None:
        """Write the missing stages of a round to the run directory, with the current policy.

        All ranks call it together when Lightning requests the epoch's dataloader, after weights are restored. Complete
        stages are not changed.

        Args:
            index: Index of the round, from 0; always 0 if all epochs train on the same pairs.

        Raises:
            InputError: The round can't be prepared.
        """

    def finish_run(self, rounds: int) -> None:
        """Evaluate the policy of a finished run that is started again, without training.

        Args:
            rounds: Number of rounds that were trained on.
        """
