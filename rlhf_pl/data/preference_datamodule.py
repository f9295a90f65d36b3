"""The DataModule of reward-model training."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rlhf_pl.algorithms.agreement import longer_text
from rlhf_pl.checkpointing.progress import rounds_done, run_seed
from rlhf_pl.data.base_datamodule import PairsDataModule
from rlhf_pl.data.files import each_rendered
from rlhf_pl.data.held_out import prompt_key, split_groups
from rlhf_pl.data.options import check_module, refuse_other_rows
from rlhf_pl.data.pair_batches import RoundBatches, RoundLoader
from rlhf_pl.data.preferences import Preference, load_preferences
from rlhf_pl.data.run_limits import is_over, limit_epoch, nothing_left
from rlhf_pl.models.chat_template import check_template_kwargs
from rlhf_pl.models.packed_batch import share_beginning
from rlhf_pl.models.packed_layout import Layout, to_device
from rlhf_pl.models.rendering import Rendered, Renderer, padded
from rlhf_pl.models.rotary import shared_tokens
from rlhf_pl.models.sequence_classifier import tree_inputs
from rlhf_pl.utils.errors import at_least
from rlhf_pl.utils.fingerprints import rows_fingerprint
from rlhf_pl.utils.run_date import keep_run_date, take_run_date


class PreferenceBatch:
    """B comparisons.

    Args:
        inputs: What `ClassifierLM` takes for 2B scores: of each comparison that of the chosen, then of the rejected.
        labels: Probability that the chosen answer is better, shape (B,), float32.
        margins: By how much its score should be higher, shape (B,), float32, reward units.
        longer: Whether the chosen answer is the longer text: 1, 0.5 for equal lengths, 0; shape (B,), float32.
        weight: Factor on the mean loss, so that an update's gradient is the mean over its pairs.
    """

    def __init__(
        self, inputs: dict[str, Any], labels: Tensor, margins: Tensor, longer: Tensor, weight: float = 1.0
    ) -> None:
        self.inputs, self.labels, self.margins, self.longer, self.weight = inputs, labels, margins, longer, weight

    def to(self, device: torch.device | str, **kwargs: Any) -> "PreferenceBatch":
        """The batch on `device`; Lightning calls it."""
        inputs = {n: to_device(v, device) if isinstance(v, Tensor) else v for n, v in self.inputs.items()}
        if isinstance(layout := inputs.get("layout"), Layout):
            inputs["layout"] = layout.to(device)
        labels, margins, longer = (to_device(t, device) for t in (self.labels, self.margins, self.longer))
        return PreferenceBatch(inputs, labels, margins, longer, self.weight)


class PreferenceDataset(Dataset):
    """Comparisons as token ids.

    Args:
        pairs: The comparisons.
        render: The reward model's.
        config: The reward model's.
        chat_template_kwargs: Further variables of its chat template.
        option: The option that names the source, for errors.
    """

    def __init__(
        self,
        pairs: Sequence[Preference],
        render: Renderer,
        config: Any,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        option: str = "data.preferences",
    ) -> None:
        self.pairs, self.config = pairs, config
        self.rows: list[list[Rendered]] = []

        def add(pair: Preference) -> None:
            both = [render(pair.messages, r, pair.tools, chat_template_kwargs, True) for r in pair.responses]
            self.rows.append(both)

        each_rendered(pairs, add, option)
        self.pad_id, self.shares_prompts = 0, False
        self.truncated = sum(row.truncated_tokens > 0 for both in self.rows for row in both)

    def __len__(self) -> int:
        return len(self.pairs)

    def lengths(self) -> list[int]:
        """Tokens of each pair: without what both have in common a second time, or both rows as long as the longer."""
        if self.shares_prompts:
            return [sum(map(len, both)) - common for both, common in zip(self.rows, self._common, strict=True)]
        return [2 * max(map(len, both)) for both in self.rows]

    @cached_property
    def _common(self) -> list[int]:
        """With how many tokens the two rows of each pair begin alike."""
        return [shared_tokens([row.ids for row in both], self.config) for both in self.rows]

    def _inputs(self, indices: Sequence[int]) -> dict[str, Any]:
        if self.shares_prompts:
            trees = [share_beginning([row.ids for row in self.rows[i]], self._common[i]) for i in indices]
            return tree_inputs(trees)
        return padded([row for i in indices for row in self.rows[i]], self.pad_id)

    def __getitems__(self, request: tuple[list[int], float]) -> PreferenceBatch:
        indices, weight = request
        pairs = [self.pairs[i] for i in indices]
        longer = [longer_text(p.chosen, p.rejected) for p in pairs]
        return PreferenceBatch(
            self._inputs(indices),
            torch.tensor([p.label for p in pairs]),
            torch.tensor([p.margin for p in pairs]),
            torch.tensor(longer),
            weight,
        )


class PreferenceDataModule(PairsDataModule):
    """Comparisons for training a reward model.

    Args:
        preferences: A .jsonl, .json, .csv or .parquet file, or a Hub id.
        columns: What your data calls the columns `prompt`, `chosen`, `rejected`, `label`, `margin` and `tools`.
        split: Split of a Hub data set.
        system_prompt: Put in front of conversations that have none.
        chat_template_kwargs: Further variables of the chat template, such as `{enable_thinking: false}`.
        parse_dialogues: Take texts of the form `\\n\\nHuman: ... \\n\\nAssistant: ...` for dialogues, and say how many
            rows are such.
        ties: `drop` rows without a preference, or keep them with the label 0.5 (`half`).
        on_wrong_pairs: What becomes of rows with equal or empty answers: `error`, or `drop`, which counts them.
        val_preferences: Held out: a share below 1, a number of pairs, or a file or Hub id of such. All pairs of a
            prompt are on the same side.
        split_seed: Chooses the held-out prompts.
        max_tokens: Longer conversations are cut from the left of the prompt, and counted.
        batch_size: Pairs per micro-batch and device. An update sees batch_size x accumulate_grad_batches x devices.
        max_tokens_per_batch: Tokens of a micro-batch at most (a single longer pair aside), what both rows of a pair
            begin with counted once; for models that can't share it, both rows as long as the longer one. An update then
            has the same pairs, divided into as many micro-batches as that takes; null for batch_size pairs in each.
        num_workers: Loader processes.
        seed: Shuffles the pairs; null takes the run's `seed_everything`.
    """

    def __init__(
        self,
        preferences: str,
        columns: dict[str, str] | None = None,
        split: str = "train",
        system_prompt: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        parse_dialogues: bool = True,
        ties: Literal["drop", "half"] = "drop",
        on_wrong_pairs: Literal["error", "drop"] = "error",
        val_preferences: float | str = 0.1,
        split_seed: int = 0,
        max_tokens: int = 1024,
        batch_size: int = 8,
        max_tokens_per_batch: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, max_tokens_per_batch)
        at_least(
            "data",
            max_tokens=(max_tokens, 2),
            batch_size=(batch_size, 1),
            max_tokens_per_batch=(max_tokens_per_batch, 1),
            num_workers=(num_workers, 0),
        )
        self.source, self.columns, self.split, self.system_prompt = preferences, columns, split, system_prompt
        self.chat_template_kwargs, self.parse_dialogues = chat_template_kwargs or {}, parse_dialogues
        self.ties, self.on_wrong_pairs = ties, on_wrong_pairs
        self.val_source, self.split_seed = val_preferences, split_seed
        self.max_tokens, self.num_workers, self._seed = max_tokens, num_workers, seed
        self.train_set: PreferenceDataset | None = None
        self.val_set: PreferenceDataset | None = None
        self.dropped: dict[str, int] = {}

    @property
    def seed(self) -> int:
        """The run's seed."""
        return run_seed() if self._seed is None else self._seed

    def setup(self, stage: str) -> None:
        """Read, check, split and tokenize the pairs. Runs before any model loads."""
        if self.train_set is not None:
            return
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        check_module(module, self, "RewardModelModule")
        render, kwargs = module.renderer(self.max_tokens), self.chat_template_kwargs
        check_template_kwargs(render.tokenizer, kwargs, "data.chat_template_kwargs")
        take_run_date(self.trainer)
        val_option = "data.preferences"
        pairs = self._load(self.source, "data.preferences")
        if isinstance(self.val_source, str):
            val_option = "data.val_preferences"
            train, val = pairs, self._load(self.val_source, val_option)
        else:
            keys = [prompt_key(p.messages) for p in pairs]
            train_rows, val_rows = split_groups(keys, self.val_source, self.split_seed, "data.val_preferences")
            train, val = [pairs[i] for i in train_rows], [pairs[i] for i in val_rows]
        config = module.source.config
        train_set = PreferenceDataset(train, render, config, kwargs)
        self.train_set, self.val_set = train_set, PreferenceDataset(val, render, config, kwargs, val_option)
        for dataset, option in ((self.train_set, "data.preferences"), (self.val_set, val_option)):
            rows = zip(dataset.pairs, dataset.rows, strict=True)
            module.source.check_ids(((pair.name, row.ids) for pair, both in rows for row in both), option)

    def _load(self, source: str, option: str) -> list[Preference]:
        found = load_preferences(
            source,
            self.columns,
            self.system_prompt,
            self.split,
            self.ties,
            self.on_wrong_pairs,
            option,
            self.parse_dialogues,
        )
        for reason, count in found.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
        return found.pairs

    def describe(self) -> str:
        """What there is to train on, in a line."""
        assert self.train_set is not None
        assert self.val_set is not None
        notes = [f"{count} left out ({reason.replace('_', ' ')})" for reason, count in self.dropped.items() if count]
        truncated = self.train_set.truncated + self.val_set.truncated
        if truncated:
            notes.append(f"{truncated} conversations cut to {self.max_tokens} tokens")
        return "; ".join([f"Pairs: {len(self.train_set)} for training, {len(self.val_set)} held out", *notes])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint notes of the data."""
        return {"rows": self._rows_hash}

    @cached_property
    def _rows_hash(self) -> str:
        """Of the training rows, which stay as they are; every checkpoint asks for it."""
        assert self.train_set is not None
        return rows_fingerprint(row.ids for both in self.train_set.rows for row in both)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with other data than the checkpoint's."""
        refuse_other_rows(state_dict, self.state_dict())

    def train_dataloader(self) -> Any:
        assert self.train_set is not None
        if is_over(self._trainer):  # a finished run that is started again
            return nothing_left(self._trainer)
        epoch = rounds_done(self._trainer)
        keep_run_date(self._trainer)
        return self._loader(self.train_set, limit_epoch(self._trainer, self.divide(epoch)), epoch)

    def divide(self, epoch: int) -> RoundBatches:
        assert self.train_set is not None
        self._follow_module()
        return self._divide(f"{self.seed}:{epoch}", len(self.train_set), self.train_set.lengths())

    def val_dataloader(self) -> Any:
        assert self.val_set is not None
        if len(self.val_set) == 0:
            return []
        self._follow_module()
        batches = self._held_out_batches(len(self.val_set), self.val_set.lengths())
        return self._loader(self.val_set, batches, 0)

    def _loader(self, dataset: PreferenceDataset, batches: RoundBatches, epoch: int) -> RoundLoader:
        return RoundLoader(dataset, batches, epoch, self.num_workers)

    def _follow_module(self) -> None:
        """Make the rows that the model takes, which is loaded by now."""
        module: Any = self._trainer.lightning_module
        for dataset in (self.train_set, self.val_set):
            assert dataset is not None
            dataset.pad_id, dataset.shares_prompts = module.pad_id, module.shares_prompts
