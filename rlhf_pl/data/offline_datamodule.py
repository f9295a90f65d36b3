"""The DataModule of pairs that were sampled and scored elsewhere."""

from typing import Any

from rlhf_pl.checkpointing.progress import rounds_done
from rlhf_pl.data.compatibility import check_policy_module
from rlhf_pl.data.group_batches import GroupDataset
from rlhf_pl.data.group_sampler import GroupSampler
from rlhf_pl.data.held_out import check_held_out, hold_out
from rlhf_pl.data.micro_batches import MicroBatchSampler, ResumableLoader
from rlhf_pl.data.offline_pairs import OfflinePair, PairReader, describe_dropped
from rlhf_pl.data.overflow import read_groups
from rlhf_pl.data.pairs_datamodule import PairsDataModule
from rlhf_pl.data.run_limits import is_run_over, limit_epoch, make_empty_loader
from rlhf_pl.data.stored_groups import StoredGroups
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.models.chat_template import check_template_kwargs
from rlhf_pl.store.round_store import Round, RoundStore
from rlhf_pl.utils.errors import InputError, check_at_least, check_finite
from rlhf_pl.utils.run_date import save_run_date, set_run_date


class OfflineDataModule(PairsDataModule):
    """Pairs of responses, as the only round of a run that does not sample.

    A row has `prompt`, `chosen` and `rejected`; or two conversations in `chosen` and `rejected`, whose common beginning
    is the prompt. `chosen_reward` and `rejected_reward` are required where the loss reads rewards, as REBEL does. The
    columns of the REBEL authors' data (`reject`, `llama_chosen_tokens`, `chosen_logprob`, ...) are known. Token columns
    are used without their padding. Log-probs under pi_old and the reference, as far as the loss needs them, are
    computed once before training and stored in the run directory. Every epoch is another pass over the same pairs, or
    `updates_per_round` updates on them.

    Args:
        pairs: A .jsonl, .json, .csv or .parquet file, or a Hub id.
        columns: Our column names mapped to those of your data, e.g. `{"rejected_reward": "worst_score"}`.
        split: Split of a Hub data set.
        system_prompt: Prepended to conversations without a system prompt.
        chat_template_kwargs: Further variables of the chat template, e.g. `{enable_thinking: false}`.
        parse_dialogues: Read text of the form `\\n\\nHuman: ... \\n\\nAssistant: ...` as a dialogue, and report the
            number of such rows.
        temperature: Temperature at which the responses were sampled; log-probs are at this temperature.
        use_tokens: Use token columns, if a row has them, instead of tokenizing the texts.
        use_logprobs: Use log-prob columns, if a row has them; they require the token columns.
        max_prompt_tokens: Pairs with longer prompts are dropped and counted.
        max_response_tokens: Pairs with longer responses are dropped and counted.
        val_pairs: Held-out pairs: a share below 1, a number of pairs, or a file or Hub id.
        split_seed: Selects the held-out prompts.
        batch_size: Pairs per micro-batch and device. An update has batch_size x accumulate_grad_batches x devices.
        max_tokens_per_batch: Maximum tokens of a micro-batch, prompts counted once; only a prompt with one response may
            be longer. An update keeps its pairs and is divided into as many micro-batches as needed, of pairs of
            similar length. The responses of a longer pair or prompt group are divided among micro-batches, each with
            the prompt; the gradient stays the same, at the cost of one more pass without gradient. null for batch_size
            pairs per micro-batch.
        updates_per_round: Number of updates of an epoch, whatever its number of pairs; null for one pass over them.
            When all pairs have been used, they are used again in another order. An update has no pair twice.
        num_workers: Loader processes.
        seed: Shuffles the pairs; null for the run's `seed_everything`.
    """

    def __init__(
        self,
        pairs: str,
        columns: dict[str, str] | None = None,
        split: str = "train",
        system_prompt: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        parse_dialogues: bool = True,
        temperature: float = 1.0,
        use_tokens: bool = True,
        use_logprobs: bool = True,
        max_prompt_tokens: int = 1024,
        max_response_tokens: int = 2048,
        val_pairs: float | str = 0.0,
        split_seed: int = 0,
        batch_size: int = 4,
        max_tokens_per_batch: int | None = None,
        updates_per_round: int | None = None,
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
        check_at_least("data", max_prompt_tokens=(max_prompt_tokens, 1), max_response_tokens=(max_response_tokens, 1))
        check_held_out("data.val_pairs", val_pairs)
        check_finite("data", temperature=temperature)
        if not temperature > 0:
            raise InputError(f"`data.temperature` must be above 0, got {temperature}.")
        self.source, self.temperature = pairs, temperature
        self.use_tokens, self.use_logprobs = use_tokens, use_logprobs
        self.max_prompt_tokens, self.max_response_tokens = max_prompt_tokens, max_response_tokens
        self.val_source, self.split_seed = val_pairs, split_seed
        self.train_set: list[OfflinePair] = []
        self.val_set: list[OfflinePair] = []
        self.dropped: dict[str, int] = {}

    @property
    def longest_tokens(self) -> int:
        """Number of tokens of the longest prompt with its response."""
        return max(len(p.prompt_tokens) + max(map(len, p.tokens)) for p in [*self.train_set, *self.val_set])

    @property
    def stored(self) -> Round:
        """The training pairs in the run directory."""
        return RoundStore(self._trainer.default_root_dir).round(0)

    @property
    def stored_held_out(self) -> Round:
        """The held-out pairs in the run directory."""
        return RoundStore(self._trainer.default_root_dir).held_out(0)

    def setup(self, stage: str) -> None:
        """Read, check, tokenize and split the pairs. Runs before any model loads."""
        if self.train_set:
            return
        module: Any = self._trainer.lightning_module
        check_policy_module(module, self)
        check_template_kwargs(module.source.tokenizer, self.chat_template_kwargs, "data.chat_template_kwargs")
        set_run_date(self._trainer)
        self.train_set, self.val_set, self.dropped = self.read_pairs(module)

    def read_pairs(self, module: Any) -> tuple[list[OfflinePair], list[OfflinePair], dict[str, int]]:
        """Read, check and tokenize the pairs for a policy.

        Args:
            module: The policy module.

        Returns:
            Pairs to train on, held-out pairs, and the number of rows that are left out by reason.
        """
        reader = PairReader(
            model=module.source,
            columns=self.columns,
            split=self.split,
            system_prompt=self.system_prompt,
            chat_template_kwargs=self.chat_template_kwargs,
            parse_dialogues=self.parse_dialogues,
            use_tokens=self.use_tokens,
            use_logprobs=self.use_logprobs,
            max_prompt_tokens=self.max_prompt_tokens,
            max_response_tokens=self.max_response_tokens,
            needs_rewards=module.loss.needs_reward_values or module.kl_coef != 0,
            has_kl=module.kl_coef != 0,
            starts_as_reference=module.reference_source is module.source,
        )
        pairs, option = reader.read(self.source, "data.pairs"), "data.val_pairs"
        train, val = hold_out(
            pairs, self.val_source, option, reader.read, lambda p: repr(list(p.prompt_tokens)), seed=self.split_seed
        )
        return train, val, reader.dropped

    def describe(self) -> str:
        """A line with the number of pairs."""
        left_out = f"; left out: {describe_dropped(self.dropped)}" if self.dropped else ""
        return f"Pairs: {len(self.train_set)} for training, {len(self.val_set)} held out{left_out}"

    def train_dataloader(self) -> Any:
        if is_run_over(self._trainer):  # a finished run that is started again
            return make_empty_loader(self._trainer)
        epoch = rounds_done(self._trainer)
        save_run_date(self._trainer)
        if self._source is not None:
            self._source.prepare_round(0)
        dataset = self._read_groups(self.stored)
        batches = limit_epoch(self._trainer, self.accumulate_over(self._batches(epoch, dataset)))
        return ResumableLoader(dataset, batches, epoch, self.num_workers)

    def divide(self, epoch: int) -> MicroBatchSampler:
        return self._batches(epoch, self._read_groups(self.stored))

    def training_steps(self, epoch: int, groups: StoredGroups) -> tuple[StoredGroups, list[list[list[int]]]]:
        """What an epoch's micro-batches are made of, and the indices of those in each micro-batch and rank."""
        batches = self._divide_groups(f"{self.seed}:{epoch}", groups, by_length=True)
        return batches.parts.items, batches.all_steps()

    def mismatched_steps(self, epoch: int, groups: StoredGroups) -> tuple[StoredGroups, list[list[list[int]]]]:
        """The same for the responses under other prompts."""
        batches = self._divide_groups(f"{self.seed}:{epoch}", groups, by_length=True)
        if batches.mismatched is None:
            return groups, []
        return batches.mismatched.items, batches.mismatched_steps()

    def _batches(self, epoch: int, dataset: GroupDataset) -> GroupSampler:
        module: Any = self._trainer.lightning_module
        sizes = dataset.sizes(module.loss, module.kl_coef)
        batches = self._divide_groups(f"{self.seed}:{epoch}", dataset.stored, by_length=True, sizes=sizes)
        dataset.parts, dataset.mismatched = batches.parts, batches.mismatched
        return batches

    def val_dataloader(self) -> Any:
        if not self.val_set:
            return []
        if self._source is not None:
            self._source.prepare_round(0)
        dataset = self._read_groups(self.stored_held_out)
        batches = self._held_out_groups(dataset, len(dataset), by_length=True)
        return ResumableLoader(dataset, batches, 0, self.num_workers)

    def _read_groups(self, stored: Round) -> GroupDataset:
        if not stored.is_complete("logps"):
            raise InputError(
                f"The log-probs of {stored.path} are missing: add OfflineLogps() to the Trainer's callbacks."
            )
        module: Any = self._trainer.lightning_module
        return read_groups(module, stored, self.temperature, "`data.pairs`", ranks_of(self._trainer))
