"""Base class of the DataModules: options for reading and batching, the seed, and access to the Trainer."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import lightning as L

from rlhf_pl.data.compatibility import check_same_rows
from rlhf_pl.utils.errors import check_at_least
from rlhf_pl.utils.fingerprints import rows_fingerprint
from rlhf_pl.utils.seed import run_seed


class RowsDataModule(L.LightningDataModule, ABC):
    """Rows of a file or of a Hub data set, tokenized by a chat template, in batches.

    Args:
        columns: Our column names mapped to those of the data; None for the same names.
        split: Split of a Hub data set.
        system_prompt: Prepended to conversations without a system prompt.
        chat_template_kwargs: Further variables of the chat template.
        parse_dialogues: Whether text in the form of a dialogue becomes messages.
        batch_size: Rows per micro-batch and device.
        num_workers: Loader processes.
        seed: Shuffles the rows; None for the run's `seed_everything`.
    """

    def __init__(
        self,
        columns: dict[str, str] | None,
        split: str,
        system_prompt: str | None,
        chat_template_kwargs: dict[str, Any] | None,
        parse_dialogues: bool,
        batch_size: int,
        num_workers: int,
        seed: int | None,
    ) -> None:
        super().__init__()
        check_at_least("data", batch_size=(batch_size, 1), num_workers=(num_workers, 0))
        self.columns, self.split, self.system_prompt = columns, split, system_prompt
        self.chat_template_kwargs, self.parse_dialogues = chat_template_kwargs or {}, parse_dialogues
        self.batch_size, self.num_workers, self._seed = batch_size, num_workers, seed

    @property
    def seed(self) -> int:
        """The seed of this DataModule; by default that of the run."""
        return run_seed() if self._seed is None else self._seed

    @property
    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            name = type(self).__name__
            raise RuntimeError(f"{name} works inside a Trainer: trainer.fit(module, datamodule=this).")
        return self.trainer

    @abstractmethod
    def setup(self, stage: str) -> None:
        """Read, check, split and tokenize the rows. Runs before any model loads."""

    def trained_rows(self) -> Iterable[Any] | None:
        """The rows of every epoch, which must not change between starts; None if rounds provide the rows."""
        return None

    @property
    def update_size(self) -> dict[str, int]:
        """The options above 1 that determine how many rows an update has, with their values."""
        options = {"data.batch_size": self.batch_size, "trainer.accumulate_grad_batches": self._accumulation}
        return {name: value for name, value in options.items() if value > 1}

    @property
    def _accumulation(self) -> int:
        return self._trainer.accumulate_grad_batches

    def state_dict(self) -> dict[str, Any]:
        """A hash of the training rows, for the checkpoint."""
        return {} if self._rows_hash is None else {"rows": self._rows_hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise InputError if the checkpoint was trained on other rows."""
        if self._rows_hash is not None:
            check_same_rows(state_dict, self.state_dict())

    @cached_property
    def _rows_hash(self) -> str | None:
        """Cached: every checkpoint stores it, and the rows do not change."""
        rows = self.trained_rows()
        return None if rows is None else rows_fingerprint(rows)
