"""What the DataModules share: their options of reading and batching, the run's seed, the Trainer that they serve."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import lightning as L

from rlhf_pl.checkpointing.progress import run_seed
from rlhf_pl.data.options import refuse_other_rows
from rlhf_pl.utils.errors import at_least
from rlhf_pl.utils.fingerprints import rows_fingerprint


class RowsDataModule(L.LightningDataModule, ABC):
    """Rows of a file or of a Hub data set, tokenized by a chat template, in batches.

    Args:
        columns: What the data calls our columns; None for the same.
        split: Split of a Hub data set.
        system_prompt: Put in front of conversations that have none.
        chat_template_kwargs: Further variables of the chat template.
        parse_dialogues: Whether text in the form of a dialogue becomes messages.
        batch_size: Of a micro-batch, per device.
        num_workers: Loader processes.
        seed: Shuffles the rows; None takes the run's `seed_everything`.
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
        at_least("data", batch_size=(batch_size, 1), num_workers=(num_workers, 0))
        self.columns, self.split, self.system_prompt = columns, split, system_prompt
        self.chat_template_kwargs, self.parse_dialogues = chat_template_kwargs or {}, parse_dialogues
        self.batch_size, self.num_workers, self._seed = batch_size, num_workers, seed

    @property
    def seed(self) -> int:
        """The run's seed."""
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
        """What a checkpoint must find again of the rows that every epoch trains on; None where rounds bring them."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint notes of the data."""
        return {} if self._rows_hash is None else {"rows": self._rows_hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with other data than the checkpoint's."""
        if self._rows_hash is not None:
            refuse_other_rows(state_dict, self.state_dict())

    @cached_property
    def _rows_hash(self) -> str | None:
        """Every checkpoint asks for it, and the rows stay as they are."""
        rows = self.trained_rows()
        return None if rows is None else rows_fingerprint(rows)
