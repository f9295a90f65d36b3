"""The DataModule of the round store: an epoch is a round."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlhf_pl.checkpointing.progress import is_inside_round, rounds_done
from rlhf_pl.data.compatibility import check_policy_module
from rlhf_pl.data.group_batches import GroupDataset
from rlhf_pl.data.group_sampler import GroupSampler
from rlhf_pl.data.held_out import check_held_out, default_held_out, hold_out
from rlhf_pl.data.micro_batches import MicroBatchSampler, ResumableLoader
from rlhf_pl.data.overflow import read_groups
from rlhf_pl.data.pairs_datamodule import PairsDataModule
from rlhf_pl.data.prompts import (
    Prompt,
    count_duplicates,
    load_prompts,
    select_prompts,
    take_prompts,
    tokenize_prompts,
)
from rlhf_pl.data.run_limits import is_run_over, make_empty_loader
from rlhf_pl.data.stored_groups import StoredGroups
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.models.chat_template import check_template_kwargs
from rlhf_pl.store.round_store import Round, RoundStore
from rlhf_pl.store.waves import REFILL
from rlhf_pl.utils.errors import InputError, check_at_least
from rlhf_pl.utils.run_date import save_run_date, set_run_date


class RoundDataModule(PairsDataModule):
    """The prompts of the rounds, and the pairs of each round.

    Batches are read from the round store only. A missing round is prepared by the `RoundSource` of `prepare_with`,
    which is the `RoundRefresh` callback. A store that was prepared elsewhere can be trained on without a sampler.

    Args:
        prompts: A .jsonl, .json, .csv or .parquet file, or a Hub id.
        columns: The columns `prompt`, `messages`, `prompt_id` and `tools` mapped to those of your data.
        split: Split of a Hub data set.
        system_prompt: Prepended to conversations without a system prompt.
        chat_template_kwargs: Further variables of the chat template, e.g. `{enable_thinking: false}`; also for the
            templates of reward models.
        parse_dialogues: Read text that begins with `\\n\\nHuman:` and ends with `\\n\\nAssistant:` as a dialogue, and
            report the number of such rows. false reads it as a user message.
        max_prompt_tokens: Longer prompts (template included) are dropped and counted.
        val_prompts: Prompts held out for evaluation: a number, a share below 1 (at least one prompt), or a file or Hub
            id; null for a fifth of the prompts, at most 64, and none of fewer than 5. 0 for none.
        prompts_per_round: Number of prompts of a round; null for all.
        batch_size: Pairs per micro-batch and device; prompts for a loss on prompt groups, or if `rollout.selector`
            gives several pairs of a prompt. An update has batch_size x accumulate_grad_batches x devices.
        max_tokens_per_batch: Maximum tokens of a micro-batch, prompts counted once; only a prompt with one response may
            be longer. An update keeps its pairs and is divided into as many micro-batches as needed, of pairs of
            similar length. The responses of a longer pair or prompt group are divided among micro-batches, each with
            the prompt; the gradient stays the same, at the cost of one more pass without gradient. null for batch_size
            pairs per micro-batch.
        passes: Number of training passes over a round's pairs. An update has no pair twice: if a round has fewer pairs
            than an update, each pass is one update.
        updates_per_round: Number of updates of a round, whatever its number of pairs; null for those of its `passes`.
            When all pairs have been used, they are used again in another order. An update has no pair twice. Excludes
            `passes` above 1.
        max_val_pairs: Maximum number of held-out prompts whose pairs give `val/loss` and `val/sign_align`; 0 for none.
            They require 2 or more responses to each held-out prompt.
        num_workers: Loader processes.
        seed: Shuffles prompts and pairs; null for the run's `seed_everything`.
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
        val_prompts: int | float | str | None = None,
        prompts_per_round: int | None = None,
        batch_size: int = 4,
        max_tokens_per_batch: int | None = None,
        passes: int = 1,
        updates_per_round: int | None = None,
        max_val_pairs: int = 64,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            max_tokens_per_batch,
            updates_per_round,
            columns=columns,
            split=split,
            system_prompt=system_prompt,
            chat_template_kwargs=chat_template_kwargs,
            parse_dialogues=parse_dialogues,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        check_at_least(
            "data",
            max_prompt_tokens=(max_prompt_tokens, 1),
            prompts_per_round=(prompts_per_round, 1),
            passes=(passes, 1),
            max_val_pairs=(max_val_pairs, 0),
        )
        if updates_per_round is not None and passes > 1:
            raise InputError(
                f"`data.updates_per_round` is {updates_per_round} and `data.passes` is {passes}: both determine the "
                "number of updates of a round. Give one of them."
            )
        if val_prompts is not None:
            check_held_out("data.val_prompts", val_prompts)
        self.prompts_source = prompts
        self.max_prompt_tokens = max_prompt_tokens
        self.val_prompts_source = val_prompts
        self.prompts_per_round = prompts_per_round
        self.passes = passes
        self.max_val_pairs = max_val_pairs
        self.train_prompts: list[Prompt] = []
        self.held_out: list[Prompt] = []
        self.evaluates = True  # set by the callback that prepares rounds: whether held-out prompts are sampled
        self.prompts_too_long = 0
        self.duplicate_prompts = 0
        self.max_response_tokens: int | None = None  # set by the callback that prepares rounds

    @property
    def store(self) -> RoundStore:
        """The round store in the run directory, which is the Trainer's `default_root_dir`."""
        return RoundStore(self._trainer.default_root_dir)

    @property
    def val_prompts(self) -> list[Prompt]:
        """The held-out prompts that the policy is evaluated on."""
        return self.held_out if self.evaluates else []

    @property
    def longest_tokens(self) -> int:
        """Maximum number of tokens of a prompt with its response."""
        response_tokens = self.max_response_tokens
        if response_tokens is None:  # the rounds were prepared elsewhere
            response_tokens = int(self.store.round(0).info("responses")["sampling"]["max_response_tokens"])
        return response_tokens + max(len(p.token_ids) for p in [*self.train_prompts, *self.held_out])

    @property
    def round_index(self) -> int:
        """Index of the round in training, or of the next one."""
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
        set_run_date(self._trainer)
        rows = self.load_rows(self.prompts_source, "data.prompts")
        val_source, val_option = self.val_prompts_source, "data.val_prompts"
        if val_source is None:
            val_source = default_held_out(len(rows))
        train, val = hold_out(rows, val_source, val_option, self.load_rows, lambda p: p.prompt_id, least=1)
        self.train_prompts, too_long = tokenize_prompts(train, tokenizer, self.max_prompt_tokens, kwargs)
        val_option = val_option if isinstance(val_source, str) else "data.prompts"
        self.held_out, val_too_long = tokenize_prompts(val, tokenizer, self.max_prompt_tokens, kwargs, val_option)
        for prompts, option in ((self.train_prompts, "data.prompts"), (self.held_out, val_option)):
            module.source.check_ids(((p.name, p.token_ids) for p in prompts), option)
        self.prompts_too_long = too_long + val_too_long
        self.duplicate_prompts = count_duplicates([*train, *val])
        if not self.train_prompts:
            raise InputError(
                f"`data.prompts`: no row of {self.prompts_source!r} is left to train on: all {too_long} are longer "
                f"than max_prompt_tokens={self.max_prompt_tokens} with the chat template."
            )

    def load_rows(self, source: str, option: str) -> list[Prompt]:
        """Read and check the prompts of a file or Hub data set; `option` names it in errors."""
        return load_prompts(source, self.columns, self.system_prompt, self.split, self.parse_dialogues, option)

    def round_prompts(self, round_index: int) -> list[Prompt]:
        """The training prompts of a round, if no round before it was refilled."""
        return select_prompts(self.train_prompts, round_index, self.prompts_per_round, self.seed)

    def prompts_of(self, stored: Round, manifest: Mapping[str, Any] | None = None) -> list[Prompt]:
        """The prompts of a stored round, refilled ones included, or of an evaluation.

        Args:
            stored: The round.
            manifest: Its manifest, where that is known; null to read it.
        """
        if stored.is_held_out:
            return self.val_prompts
        refill = (stored.manifest if manifest is None else manifest).get(REFILL)
        if refill is None:
            return self.round_prompts(int(stored.path.name))
        count = sum(wave["prompts"] for wave in refill["waves"])
        return take_prompts(self.train_prompts, refill["start"], count, self.seed)[0]

    def check_ready(self) -> None:
        """Raise before the model loads if rounds are missing and no `RoundSource` can prepare them."""
        if self._source is None and not self.store.round(0).is_complete("logps"):
            raise InputError(
                f"`rollout.reward` is missing, and {self.store.run_dir} holds no prepared rounds. Give a Python "
                "function (--rollout.reward examples.short_answer.score) or a reward class with its options "
                "(--rollout.reward ClassifierReward --rollout.reward.model MODEL); docs/rewards.md lists them. Or take "
                "the rewards of another run's rounds: --rounds_from RUN_DIR."
            )

    def train_dataloader(self) -> Any:
        index = self.round_index
        if is_run_over(self._trainer):  # a finished run that is started again
            if self._source is not None and not is_inside_round(self._trainer):
                self._source.finish_run(index)
            return make_empty_loader(self._trainer)
        save_run_date(self._trainer)
        if self._source is not None:
            self._source.prepare_round(index)
        dataset = self._read_groups(self.store.round(index))
        if dataset is None:
            raise InputError(
                f"Round {index} is not in {self.store.run_dir}, and can't be prepared without `rollout.reward`."
            )
        batches = self.accumulate_over(self._batches(index, dataset))
        return ResumableLoader(dataset, batches, index, self.num_workers)

    def divide(self, epoch: int) -> MicroBatchSampler:
        dataset = self._read_groups(self.store.round(epoch))
        assert dataset is not None
        return self._batches(epoch, dataset)

    def training_steps(self, index: int, groups: StoredGroups) -> tuple[StoredGroups, list[list[list[int]]]]:
        """What a round's micro-batches are made of, and the indices of those in each micro-batch and rank."""
        batches = self._batches_of(index, groups)
        return batches.parts.items, batches.all_steps()

    def mismatched_steps(self, index: int, groups: StoredGroups) -> tuple[StoredGroups, list[list[list[int]]]]:
        """The same for the responses under other prompts."""
        batches = self._batches_of(index, groups)
        if batches.mismatched is None:
            return groups, []
        return batches.mismatched.items, batches.mismatched_steps()

    def _batches(self, index: int, dataset: GroupDataset) -> GroupSampler:
        module: Any = self._trainer.lightning_module
        batches = self._batches_of(index, dataset.stored, dataset.sizes(module.loss, module.kl_coef))
        dataset.parts, dataset.mismatched = batches.parts, batches.mismatched
        return batches

    def _batches_of(
        self, index: int, groups: StoredGroups, sizes: Sequence[Sequence[int] | None] = (None,)
    ) -> GroupSampler:
        by_length = self.max_tokens_per_batch is not None
        return self._divide_groups(f"{self.seed}:{index}", groups, by_length, self.passes, sizes)

    def val_dataloader(self) -> Any:
        """The held-out pairs of the policy that sampled the current round, if there are any."""
        dataset = self._read_groups(self.store.held_out(self.round_index))
        if dataset is None or len(dataset) == 0:
            return []
        batches = self._held_out_groups(dataset, min(len(dataset), self.max_val_pairs), by_length=False)
        return ResumableLoader(dataset, batches, self.round_index, self.num_workers)

    def _read_groups(self, stored: Round) -> GroupDataset | None:
        if not stored.is_complete("logps"):
            return None
        temperature = stored.info("responses")["sampling"]["temperature"]
        scored_by = stored.manifest["stages"].get("rewards", {}).get("reward", "")
        module: Any = self._trainer.lightning_module
        return read_groups(module, stored, temperature, f"Reward `{scored_by}`", ranks_of(self._trainer))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return None if batch is None else batch.to(device)  # None: a round without usable pairs
