"""The DataModule of supervised fine-tuning."""

import random
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rlhf_pl.checkpointing.progress import rounds_done
from rlhf_pl.data.base_datamodule import RowsDataModule
from rlhf_pl.data.compatibility import check_module
from rlhf_pl.data.conversations import Conversation, load_conversations
from rlhf_pl.data.held_out import check_held_out, hold_out, prompt_key
from rlhf_pl.data.micro_batches import MicroBatchSampler, ResumableLoader
from rlhf_pl.data.packing import Example, fill_rows
from rlhf_pl.data.run_limits import is_run_over, limit_epoch, make_empty_loader
from rlhf_pl.data.sft_batches import SFTBatch, SFTDataset
from rlhf_pl.data.tokenizing import Recipe, iterate_token_lists, make_token_table
from rlhf_pl.data.update_plan import UpdatePlan
from rlhf_pl.models.chat import encode_conversation
from rlhf_pl.models.chat_template import check_template_kwargs
from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.errors import InputError, check_at_least
from rlhf_pl.utils.run_date import save_run_date, set_run_date


class SFTDataModule(RowsDataModule):
    """Conversations for supervised fine-tuning.

    Args:
        conversations: A .jsonl, .json, .csv or .parquet file, or a Hub id, with `messages`, or with `prompt` and
            `response`.
        columns: The columns `messages`, `prompt`, `response` and `tools` mapped to those of your data.
        split: Split of a Hub data set.
        system_prompt: Prepended to conversations without a system prompt.
        chat_template_kwargs: Further variables of the chat template, e.g. `{enable_thinking: false}`.
        parse_dialogues: Read text of the form `\\n\\nHuman: ... \\n\\nAssistant: ...` as a dialogue, and report the
            number of such rows.
        loss_on: Compute the loss on `all` responses of a conversation, on the `last` one, or on the whole
            `conversation`: on every token of it, prompts and the template's own text included. Never on a message whose
            `weight` is 0.
        packing: Pack several conversations into a row of up to `max_tokens`; they do not attend to each other.
        val_conversations: Held-out conversations: a share below 1, a number, or a file or Hub id.
        split_seed: Selects the held-out conversations.
        max_tokens: Longer conversations are dropped and counted.
        batch_size: Rows per micro-batch and device. An update has batch_size x accumulate_grad_batches x devices.
        num_workers: Loader processes.
        seed: Shuffles the conversations; null for the run's `seed_everything`.
    """

    def __init__(
        self,
        conversations: str,
        columns: dict[str, str] | None = None,
        split: str = "train",
        system_prompt: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        parse_dialogues: bool = True,
        loss_on: Literal["all", "last", "conversation"] = "all",
        packing: bool = True,
        val_conversations: float | str = 0.05,
        split_seed: int = 0,
        max_tokens: int = 2048,
        batch_size: int = 4,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(
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
        check_held_out("data.val_conversations", val_conversations)
        self.source, self.loss_on, self.packing = conversations, loss_on, packing
        self.val_source, self.split_seed, self.max_tokens = val_conversations, split_seed, max_tokens
        self.examples: list[Example] = []
        self.val_set: SFTDataset | None = None
        self.too_long = self.unlearned = 0

    @property
    def longest_tokens(self) -> int:
        """Number of tokens of the longest conversation."""
        assert self.val_set is not None
        return max(map(len, [*self.examples, *self.val_set.examples]))

    def setup(self, stage: str) -> None:
        """Read, check, split and tokenize the conversations. Runs before any model loads."""
        if self.examples:
            return
        module: Any = self._trainer.lightning_module
        check_module(module, self, SFTBatch)
        self.check_context(module.source)
        check_template_kwargs(module.source.tokenizer, self.chat_template_kwargs, "data.chat_template_kwargs")
        set_run_date(self._trainer)
        train, val = self.split_rows()
        val_option = "data.val_conversations" if isinstance(self.val_source, str) else "data.conversations"
        self.examples = self.tokenize(train, module.source, "data.conversations")
        val_examples = self.tokenize(val, module.source, val_option)
        if not self.examples:
            reason = f"all are longer than max_tokens={self.max_tokens}"
            reason += ", or have nothing to learn (`weight: 0`)" if self.unlearned else ""
            raise InputError(f"`data.conversations`: no row of {self.source!r} is left to train on: {reason}.")
        self.val_set = SFTDataset(val_examples, [[i] for i in range(len(val_examples))])

    def check_context(self, source: ModelSource) -> None:
        """Refuse rows that are longer than the model's context."""
        if self.max_tokens > source.max_context_tokens:
            raise InputError(
                f"`data.max_tokens` of {self.max_tokens} exceeds the context of {source.path!r}, "
                f"{source.max_context_tokens} tokens. Decrease it."
            )

    def split_rows(self) -> tuple[list[Conversation], list[Conversation]]:
        """Read the conversations, and return those to train on and the held-out ones."""
        rows = self.load_rows(self.source, "data.conversations")
        option, seed = "data.val_conversations", self.split_seed
        return hold_out(rows, self.val_source, option, self.load_rows, lambda c: prompt_key(c.messages[:-1]), seed=seed)

    def load_rows(self, source: str, option: str) -> list[Conversation]:
        """Read and check the conversations of a file or Hub data set; `option` names it in errors."""
        return load_conversations(source, self.columns, self.system_prompt, self.split, option, self.parse_dialogues)

    def tokenize(self, conversations: Sequence[Conversation], source: ModelSource, option: str) -> list[Example]:
        """Tokenize conversations, without those that are too long or have nothing to learn, which are counted.

        Args:
            conversations: The conversations.
            source: The model, with its tokenizer.
            option: The option that names their source, for errors.
        """
        tokenizer, eos = source.tokenizer, source.eos_token_ids
        every, kwargs, whole = self.loss_on != "last", self.chat_template_kwargs, self.loss_on == "conversation"

        def encode(conversation: Conversation) -> tuple[Sequence[int], Sequence[int]]:
            messages, tools = conversation.messages, conversation.tools
            ids, mask = encode_conversation(tokenizer, messages, eos, every, tools, kwargs, whole)
            return ids, list(map(int, mask))

        settings = {"conversation": kwargs, "eos": eos, "every": every, **({"whole": True} if whole else {})}
        recipe = Recipe(tokenizer, settings, option)
        table = make_token_table(conversations, encode, ["ids", "mask"], recipe, lambda c: [c.messages, c.tools])
        examples: list[Example] = []
        names: list[str] = []
        columns = (iterate_token_lists(table, name) for name in ("ids", "mask"))
        for conversation, ids, mask in zip(conversations, *columns, strict=True):
            if len(ids) > self.max_tokens:
                self.too_long += 1
            elif not mask.any():
                self.unlearned += 1
            else:
                examples.append(Example(array("i", ids.tobytes()), mask.astype(bool).tolist()))
                names.append(conversation.name)
        source.check_ids(((name, e.ids) for name, e in zip(names, examples, strict=True)), option)
        return examples

    def describe(self) -> str:
        """A line with the number of conversations."""
        assert self.val_set is not None
        learned_tokens = sum(sum(e.mask) for e in self.examples)
        left_out = f"; {self.too_long} left out, longer than {self.max_tokens} tokens" if self.too_long else ""
        if self.unlearned:
            left_out += f"; {self.unlearned} left out, with nothing to learn (weight 0)"
        what = "tokens" if self.loss_on == "conversation" else "response tokens"
        return (
            f"Conversations: {len(self.examples)} for training ({learned_tokens} {what}), "
            f"{len(self.val_set)} held out{left_out}"
        )

    def trained_rows(self) -> Iterable[Any]:
        return ((list(e.ids), list(e.mask)) for e in self.examples)

    @property
    def update_size(self) -> dict[str, int]:
        return {**({"data.max_tokens": self.max_tokens} if self.packing else {}), **super().update_size}

    def train_dataloader(self) -> Any:
        trainer, epoch = self._trainer, rounds_done(self._trainer)
        if is_run_over(trainer):  # a finished run that is started again
            return make_empty_loader(trainer)
        save_run_date(trainer)
        order = list(range(len(self.examples)))
        random.Random(f"{self.seed}:{epoch}:pack").shuffle(order)
        lengths = [len(e) for e in self.examples]
        rows = fill_rows(order, lengths, self.max_tokens) if self.packing else [[i] for i in order]
        dataset = SFTDataset(self.examples, rows)
        plan = UpdatePlan(len(dataset), self.batch_size, trainer.accumulate_grad_batches, trainer.world_size)
        return self._loader(dataset, plan, f"{self.seed}:{epoch}", epoch, trains=True)

    def val_dataloader(self) -> Any:
        if self.val_set is None or len(self.val_set) == 0:
            return []
        plan = UpdatePlan(len(self.val_set), self.batch_size, 1, self._trainer.world_size)
        return self._loader(self.val_set, plan, "held-out", 0)

    def _loader(
        self, dataset: SFTDataset, plan: UpdatePlan, order: str, epoch: int, trains: bool = False
    ) -> ResumableLoader:
        batches = MicroBatchSampler(
            plan, order, self._trainer.global_rank, dataset.lengths(), [dataset.target_counts()]
        )
        if trains:
            limit_epoch(self._trainer, batches)
        return ResumableLoader(dataset, batches, epoch, self.num_workers)
