"""The DataModule over the round store: an epoch is a round."""

from collections.abc import Sequence
from typing import Any

import torch

from rlhf_pl.checkpointing.progress import inside_round, rounds_done
from rlhf_pl.data.base_datamodule import PairsDataModule
from rlhf_pl.data.held_out import check_held_out, hold_out
from rlhf_pl.data.options import check_policy_module
from rlhf_pl.data.overflow import read_groups
from rlhf_pl.data.pair_batches import GroupDataset, RoundBatches, RoundLoader
from rlhf_pl.data.prompts import (
    Prompt,
    count_duplicates,
    load_prompts,
    prompts_of_round,
    tokenize_prompts,
)
from rlhf_pl.data.run_limits import is_over, nothing_left
from rlhf_pl.models.chat_template import check_template_kwargs
from rlhf_pl.store.round_store import Round, RoundStore
from rlhf_pl.utils.errors import InputError, at_least
from rlhf_pl.utils.run_date import keep_run_date, take_run_date


class RoundDataModule(PairsDataModule):
    """Prompts for the rounds, and the pairs that each round made of them.

    Batches come from the round store alone. Where a round is not there yet, the `RoundSource` of `prepare_with` makes
    it, which is the `RoundRefresh` callback; so a store prepared by someone else trains without a sampler.

    Args:
        prompts: A .jsonl, .json, .csv or .parquet file, or a Hub id.
        columns: What your data calls the columns `prompt`, `messages`, `prompt_id` and `tools`.
        split: Split of a Hub data set.
        system_prompt: Put in front of conversations that have none.
        chat_template_kwargs: Further variables of the chat template, such as `{enable_thinking: false}`; reward models'
            templates get them too.
        parse_dialogues: Take text that begins with `\\n\\nHuman:` and ends with `\\n\\nAssistant:` for a dialogue, and
            say how many rows are such; false takes it as what a user says.
        max_prompt_tokens: Longer prompts (template included) are left out and counted.
        val_prompts: Prompts held out for evaluation: their number, a share below 1 (one prompt at least), or a file
            or Hub id of such.
        prompts_per_round: Prompts a round answers; all if null.
        batch_size: Pairs per micro-batch and device; prompt groups where the loss is on these. An update sees
            batch_size x accumulate_grad_batches x devices.
        max_tokens_per_batch: Tokens of a micro-batch at most (a single longer pair aside), prompts counted once. An
            update then has the same pairs, divided into as many micro-batches as that takes, of pairs of like length;
            null for batch_size pairs in each.
        passes: Times that a round's pairs are trained on. An update has no pair twice: of a round with fewer pairs
            than an update should have, every pass is one.
        max_val_pairs: At most this many held-out pairs for `val/loss` and `val/sign_align`; 0 for none. They exist
            where held-out prompts get 2 or more answers.
        num_workers: Loader processes.
        seed: Shuffles prompts and pairs; null takes the run's `seed_everything`.
    """

    def __init__(
        self,
        prompts: str,
        columns: dict[str, str] | None = None,
        split: str = "train",
        system_prompt: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        parse_dialogues: bool = True,
        max_prompt_tokens: int = 1024,
        val_prompts: int | float | str = 0,
        prompts_per_round: int | None = None,
        batch_size: int = 4,
        max_tokens_per_batch: int | None = None,
        passes: int = 1,
        max_val_pairs: int = 64,
        num_workers: int = 0,
        seed: int | None = None,
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
        at_least(
            "data",
            max_prompt_tokens=(max_prompt_tokens, 1),
            prompts_per_round=(prompts_per_round, 1),
            passes=(passes, 1),
            max_val_pairs=(max_val_pairs, 0),
        )
        check_held_out("data.val_prompts", val_prompts)
        self.prompts_source = prompts
        self.max_prompt_tokens = max_prompt_tokens
        self.val_prompts_source = val_prompts
        self.prompts_per_round = prompts_per_round
        self.passes = passes
        self.max_val_pairs = max_val_pairs
        self.train_prompts: list[Prompt] = []
        self.val_prompts: list[Prompt] = []
        self.prompts_too_long = 0
        self.duplicate_prompts = 0
        self.max_response_tokens: int | None = None  # of those who prepare rounds

    @property
    def store(self) -> RoundStore:
        """The round store in the run directory, which is the Trainer's `default_root_dir`."""
        return RoundStore(self._trainer.default_root_dir)

    @property
    def longest_tokens(self) -> int:
        """The most that a prompt and its response can have."""
        most = self.max_response_tokens
        if most is None:  # rounds that someone else has prepared
            most = int(self.store.round(0).info("responses")["sampling"]["max_response_tokens"])
        return most + max(len(p.token_ids) for p in [*self.train_prompts, *self.val_prompts])

    @property
    def round_index(self) -> int:
        """The round that trains now or next."""
        return rounds_done(self._trainer)

    def setup(self, stage: str) -> None:
        """Read, check, split and tokenize the prompts. Runs before any model loads."""
        if self.train_prompts:
            return
        module: Any = self._trainer.lightning_module
        check_policy_module(module, self)
        tokenizer = module.source.tokenizer
        kwargs = self.chat_template_kwargs
        check_template_kwargs(tokenizer, kwargs, "data.chat_template_kwargs")
        take_run_date(self._trainer)
        everything = self._load(self.prompts_source, "data.prompts")
        wanted, val_option = self.val_prompts_source, "data.val_prompts"
        train, val = hold_out(everything, wanted, val_option, self._load, lambda p: p.prompt_id, least=1)
        self.train_prompts, too_long = tokenize_prompts(train, tokenizer, self.max_prompt_tokens, kwargs)
        val_option = val_option if isinstance(wanted, str) else "data.prompts"
        self.val_prompts, val_too_long = tokenize_prompts(val, tokenizer, self.max_prompt_tokens, kwargs, val_option)
        for prompts, option in ((self.train_prompts, "data.prompts"), (self.val_prompts, val_option)):
            module.source.check_ids(((p.name, p.token_ids) for p in prompts), option)
        self.prompts_too_long = too_long + val_too_long
        self.duplicate_prompts = count_duplicates([*train, *val])
        if not self.train_prompts:
            raise InputError(
                f"`data.prompts`: no row of {self.prompts_source!r} is left to train on: all {too_long} are longer "
                f"than max_prompt_tokens={self.max_prompt_tokens} with the chat template."
            )

    def _load(self, source: str, option: str) -> list[Prompt]:
        return load_prompts(source, self.columns, self.system_prompt, self.split, self.parse_dialogues, option)

    def round_prompts(self, round_index: int) -> list[Prompt]:
        """The training prompts of a round."""
        return prompts_of_round(self.train_prompts, round_index, self.prompts_per_round, self.seed)

    def prompts_of(self, stored: Round) -> list[Prompt]:
        """The prompts of a stored round, or of an evaluation."""
        return self.val_prompts if stored.is_held_out else self.round_prompts(int(stored.path.name))

    def check_ready(self) -> None:
        """Refuse a run that nothing prepares, before its model loads."""
        if self._source is None and not self.store.round(0).is_complete("logps"):
            raise InputError(
                f"`rollout.reward` is missing, and {self.store.run_dir} holds no prepared rounds. Give a Reward class "
                "or the import path of a Python function, such as --rollout.reward examples.short_answer.score"
            )

    def train_dataloader(self) -> Any:
        index = self.round_index
        if is_over(self._trainer):  # a finished run that is started again
            if self._source is not None and not inside_round(self._trainer):
                self._source.finish_run(index)
            return nothing_left(self._trainer)
        keep_run_date(self._trainer)
        if self._source is not None:
            self._source.prepare_round(index)
        dataset = self._pairs(self.store.round(index))
        if dataset is None:
            raise InputError(
                f"Round {index} is not in {self.store.run_dir}, and no `rollout.reward` is there to make it."
            )
        batches = self.accumulate_over(self._batches(index, dataset))
        return RoundLoader(dataset, batches, index, self.num_workers)

    def divide(self, epoch: int) -> RoundBatches:
        dataset = self._pairs(self.store.round(epoch))
        assert dataset is not None
        return self._batches(epoch, dataset)

    def training_steps(self, index: int, lengths: Sequence[int]) -> list[list[list[int]]]:
        """How round `index` will train on pairs or groups of these lengths: those of each micro-batch, of each rank."""
        return self._batches_of(index, lengths).steps()

    def _batches(self, index: int, dataset: GroupDataset) -> RoundBatches:
        module: Any = self._trainer.lightning_module
        return self._batches_of(index, dataset.lengths(), dataset.counts(module.loss))

    def _batches_of(self, index: int, lengths: Sequence[int], counts: Sequence[int] | None = None) -> RoundBatches:
        sorted_by = None if self.max_tokens_per_batch is None else lengths
        return self._divide(f"{self.seed}:{index}", len(lengths), sorted_by, self.passes, counts)

    def val_dataloader(self) -> Any:
        """The held-out pairs of the policy that generated the current round, if there are any."""
        dataset = self._pairs(self.store.held_out(self.round_index))
        if dataset is None or len(dataset) == 0:
            return []
        batches = self._held_out_batches(min(len(dataset), self.max_val_pairs))
        return RoundLoader(dataset, batches, self.round_index, self.num_workers)

    def _pairs(self, stored: Round) -> GroupDataset | None:
        if not stored.is_complete("logps"):
            return None
        temperature = stored.info("responses")["sampling"]["temperature"]
        scored_by = stored.manifest["stages"].get("rewards", {}).get("reward", "")
        module: Any = self._trainer.lightning_module
        return read_groups(module, stored, temperature, f"Reward `{scored_by}`")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return None if batch is None else batch.to(device)  # None: a round without usable pairs
