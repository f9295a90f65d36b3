"""The DataModule of reward-model training."""

from collections.abc import Iterable
from typing import Any, Literal

from rlhf_pl.checkpointing.progress import rounds_done
from rlhf_pl.data.centering import load_centering_rows
from rlhf_pl.data.compatibility import check_module
from rlhf_pl.data.held_out import check_held_out, hold_out, prompt_key
from rlhf_pl.data.micro_batches import MicroBatchSampler, ResumableLoader
from rlhf_pl.data.pairs_datamodule import PairsDataModule
from rlhf_pl.data.preference_batches import PreferenceBatch, PreferenceDataset
from rlhf_pl.data.preferences import Preference, load_preferences
from rlhf_pl.data.run_limits import is_run_over, limit_epoch, make_empty_loader
from rlhf_pl.models.chat_template import check_template_kwargs
from rlhf_pl.models.rendering import Rendered
from rlhf_pl.utils.errors import check_at_least
from rlhf_pl.utils.run_date import save_run_date, set_run_date


class PreferenceDataModule(PairsDataModule):
    """Comparisons for training a reward model.

    Args:
        preferences: A .jsonl, .json, .csv or .parquet file, or a Hub id.
        columns: The columns `prompt`, `chosen`, `rejected`, `label`, `margin` and `tools` mapped to those of your data.
        split: Split of a Hub data set.
        system_prompt: Prepended to conversations without a system prompt.
        chat_template_kwargs: Further variables of the chat template, e.g. `{enable_thinking: false}`.
        parse_dialogues: Read text of the form `\\n\\nHuman: ... \\n\\nAssistant: ...` as a dialogue, and report the
            number of such rows.
        ties: `drop` rows without a preference, or keep them with the label 0.5 (`half`).
        on_wrong_pairs: For rows with equal or empty responses: `error`, or `drop` and count them.
        val_preferences: Held-out pairs: a share below 1, a number of pairs, or a file or Hub id. All pairs of a prompt
            are on the same side.
        split_seed: Selects the held-out prompts.
        max_tokens: Longer conversations are truncated at the left of the prompt, and counted.
        batch_size: Pairs per micro-batch and device. An update has batch_size x accumulate_grad_batches x devices.
        max_tokens_per_batch: Maximum tokens of a micro-batch; only a single pair may be longer. The common prefix of a
            pair counts once; for models that can't share it, both rows count as the longer one. An update keeps its
            pairs and is divided into as many micro-batches as needed. null for batch_size pairs per micro-batch.
        center_on: Conversations as SFTDataModule reads them (a file or a Hub id, such as the SFT data) whose mean score
            the exported model's config records as `bias`; ClassifierReward and PPO's critic subtract it. null for none.
        num_workers: Loader processes.
        seed: Shuffles the pairs; null for the run's `seed_everything`.
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
        center_on: str | None = None,
    ) -> None:
        super().__init__(
            max_tokens_per_batch,
            columns=columns,
            split=split,
            system_prompt=system_prompt,
            chat_template_kwargs=chat_template_kwargs,
            parse_dialogues=parse_dialogues,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        check_at_least("data", max_tokens=(max_tokens, 2))
        check_held_out("data.val_preferences", val_preferences)
        self.source, self.ties, self.on_wrong_pairs = preferences, ties, on_wrong_pairs
        self.val_source, self.split_seed, self.max_tokens = val_preferences, split_seed, max_tokens
        self.center_on = center_on
        self.centering_rows: list[Rendered] = []  # of the conversations in `center_on`
        self.train_set: PreferenceDataset | None = None
        self.val_set: PreferenceDataset | None = None
        self.dropped: dict[str, int] = {}

    def setup(self, stage: str) -> None:
        """Read, check, split and tokenize the pairs. Runs before any model loads."""
        if self.train_set is not None:
            return
        module: Any = self._trainer.lightning_module
        check_module(module, self, PreferenceBatch)
        render, kwargs = module.renderer(self.max_tokens), self.chat_template_kwargs
        check_template_kwargs(render.tokenizer, kwargs, "data.chat_template_kwargs")
        set_run_date(self._trainer)
        train, val = self.split_rows()
        val_option = "data.val_preferences" if isinstance(self.val_source, str) else "data.preferences"
        if self.center_on is not None:
            how = (self.split, self.system_prompt, self.parse_dialogues, render, module.source, kwargs)
            self.centering_rows = load_centering_rows(self.center_on, *how)
        config = module.source.config
        train_set = PreferenceDataset(train, render, config, kwargs)
        self.train_set, self.val_set = train_set, PreferenceDataset(val, render, config, kwargs, val_option)
        for dataset, option in ((self.train_set, "data.preferences"), (self.val_set, val_option)):
            rows = zip(dataset.pairs, dataset.rows, strict=True)
            module.source.check_ids(((pair.name, row.ids) for pair, both in rows for row in both), option)

    def split_rows(self) -> tuple[list[Preference], list[Preference]]:
        """Read the comparisons, and return those to train on and the held-out ones."""
        rows = self.load_rows(self.source, "data.preferences")
        option, seed = "data.val_preferences", self.split_seed
        return hold_out(rows, self.val_source, option, self.load_rows, lambda p: prompt_key(p.messages), seed=seed)

    def load_rows(self, source: str, option: str) -> list[Preference]:
        """Read and check the comparisons of a file or Hub data set; `option` names it in errors."""
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
        """A line with the number of pairs."""
        assert self.train_set is not None
        assert self.val_set is not None
        notes = [f"{count} left out ({reason.replace('_', ' ')})" for reason, count in self.dropped.items() if count]
        truncated = self.train_set.truncated + self.val_set.truncated
        if truncated:
            notes.append(f"{truncated} conversations truncated to {self.max_tokens} tokens")
        return "; ".join([f"Pairs: {len(self.train_set)} for training, {len(self.val_set)} held out", *notes])

    def trained_rows(self) -> Iterable[Any]:
        assert self.train_set is not None
        return (row.ids for both in self.train_set.rows for row in both)

    def train_dataloader(self) -> Any:
        assert self.train_set is not None
        if is_run_over(self._trainer):  # a finished run that is started again
            return make_empty_loader(self._trainer)
        epoch = rounds_done(self._trainer)
        save_run_date(self._trainer)
        return self._loader(self.train_set, limit_epoch(self._trainer, self.accumulate_over(self.divide(epoch))), epoch)

    def divide(self, epoch: int) -> MicroBatchSampler:
        assert self.train_set is not None
        self._use_model_layout()
        return self._divide(f"{self.seed}:{epoch}", len(self.train_set), self.train_set.lengths())

    def val_dataloader(self) -> Any:
        assert self.val_set is not None
        if len(self.val_set) == 0:
            return []
        self._use_model_layout()
        batches = self._held_out_batches(len(self.val_set), self.val_set.lengths())
        return self._loader(self.val_set, batches, 0)

    def _loader(self, dataset: PreferenceDataset, batches: MicroBatchSampler, epoch: int) -> ResumableLoader:
        return ResumableLoader(dataset, batches, epoch, self.num_workers)

    def _use_model_layout(self) -> None:
        """Make batches in the layout that the loaded model supports: shared prefixes or padded rows."""
        module: Any = self._trainer.lightning_module
        for dataset in (self.train_set, self.val_set):
            assert dataset is not None
            dataset.pad_id, dataset.shares_prompts = module.pad_id, module.shares_prompts
