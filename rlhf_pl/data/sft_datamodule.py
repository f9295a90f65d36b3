"""The DataModule of supervised fine-tuning."""

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import lightning as L
import torch
from torch.utils.data import Dataset

from rlhf_pl.checkpointing.progress import rounds_done, run_seed
from rlhf_pl.data.conversations import Conversation, load_conversations
from rlhf_pl.data.files import each_rendered
from rlhf_pl.data.held_out import prompt_key, split_groups
from rlhf_pl.data.options import check_module, refuse_other_rows
from rlhf_pl.data.packing import Example, fill_rows, pack_examples
from rlhf_pl.data.pair_batches import RoundBatches, RoundLoader
from rlhf_pl.data.run_limits import is_over, limit_epoch, nothing_left
from rlhf_pl.data.update_plan import UpdatePlan
from rlhf_pl.models.chat import encode_conversation
from rlhf_pl.models.chat_template import check_template_kwargs
from rlhf_pl.models.packed_batch import PackedBatch
from rlhf_pl.utils.errors import InputError, at_least
from rlhf_pl.utils.fingerprints import rows_fingerprint
from rlhf_pl.utils.run_date import keep_run_date, take_run_date


class SFTBatch:
    """R rows of examples.

    Args:
        rows: The examples of all rows.
        weight: Factor on the mean loss, so that an update's gradient is the mean over its learned tokens.
    """

    def __init__(self, rows: PackedBatch, weight: float = 1.0) -> None:
        self.rows, self.weight = rows, weight

    def to(self, device: torch.device | str, **kwargs: Any) -> "SFTBatch":
        """The batch on `device`; Lightning calls it."""
        return SFTBatch(self.rows.to(device), self.weight)


class SFTDataset(Dataset):
    """Rows of examples.

    Args:
        examples: Tokenized conversations.
        rows: Numbers of the examples in each row.
    """

    def __init__(self, examples: Sequence[Example], rows: Sequence[Sequence[int]]) -> None:
        self.examples, self.rows = examples, rows

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [sum(len(self.examples[i]) for i in row) for row in self.rows]

    def learned(self) -> list[int]:
        """Learned tokens of each row."""
        return [sum(sum(self.examples[i].mask[1:]) for i in row) for row in self.rows]

    def __getitems__(self, request: tuple[list[int], float]) -> SFTBatch:
        indices, weight = request
        return SFTBatch(pack_examples([self.examples[i] for row in indices for i in self.rows[row]]), weight)


class SFTDataModule(L.LightningDataModule):
    """Conversations for supervised fine-tuning.

    Args:
        conversations: A .jsonl, .json, .csv or .parquet file, or a Hub id, with `messages`, or with `prompt` and
            `response`.
        columns: What your data calls the columns `messages`, `prompt`, `response` and `tools`.
        split: Split of a Hub data set.
        system_prompt: Put in front of conversations that have none.
        chat_template_kwargs: Further variables of the chat template, such as `{enable_thinking: false}`.
        parse_dialogues: Take text of the form `\\n\\nHuman: ... \\n\\nAssistant: ...` for a dialogue, and say how many
            rows are such.
        loss_on: What is learned: `all` answers of a conversation, or the `last` one; never a message whose `weight` is
            0.
        packing: Put several conversations in a row of up to `max_tokens`; they do not see each other.
        val_conversations: Held out: a share below 1, a number of conversations, or a file or Hub id of such.
        split_seed: Chooses the held-out conversations.
        max_tokens: Longer conversations are left out and counted.
        batch_size: Rows per micro-batch and device. An update sees batch_size x accumulate_grad_batches x devices.
        num_workers: Loader processes.
        seed: Shuffles the conversations; null takes the run's `seed_everything`.
    """

    def __init__(
        self,
        conversations: str,
        columns: dict[str, str] | None = None,
        split: str = "train",
        system_prompt: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        parse_dialogues: bool = True,
        loss_on: Literal["all", "last"] = "all",
        packing: bool = True,
        val_conversations: float | str = 0.05,
        split_seed: int = 0,
        max_tokens: int = 2048,
        batch_size: int = 4,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        at_least("data", max_tokens=(max_tokens, 2), batch_size=(batch_size, 1), num_workers=(num_workers, 0))
        self.source, self.columns, self.split, self.system_prompt = conversations, columns, split, system_prompt
        self.chat_template_kwargs, self.parse_dialogues = chat_template_kwargs or {}, parse_dialogues
        self.loss_on, self.packing = loss_on, packing
        self.val_source, self.split_seed = val_conversations, split_seed
        self.max_tokens, self.batch_size, self.num_workers, self._seed = max_tokens, batch_size, num_workers, seed
        self.examples: list[Example] = []
        self.val_set: SFTDataset | None = None
        self.too_long = self.unlearned = 0

    @property
    def seed(self) -> int:
        """The run's seed."""
        return run_seed() if self._seed is None else self._seed

    @property
    def longest_tokens(self) -> int:
        """Of the longest conversation."""
        assert self.val_set is not None
        return max(map(len, [*self.examples, *self.val_set.examples]))

    def setup(self, stage: str) -> None:
        """Read, check, split and tokenize the conversations. Runs before any model loads."""
        if self.examples:
            return
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        check_module(module, self, "SFTModule")
        if self.max_tokens > module.source.max_context_tokens:
            raise InputError(
                f"`data.max_tokens` of {self.max_tokens} is over the context of {module.source.path!r}, "
                f"{module.source.max_context_tokens} tokens. Lower it."
            )
        check_template_kwargs(module.source.tokenizer, self.chat_template_kwargs, "data.chat_template_kwargs")
        take_run_date(self.trainer)
        everything = self._load(self.source, "data.conversations")
        val_option = "data.conversations"
        if isinstance(self.val_source, str):
            val_option = "data.val_conversations"
            train, val = everything, self._load(self.val_source, val_option)
        else:
            keys = [prompt_key(c.messages[:-1]) for c in everything]
            mine, held_out = split_groups(keys, self.val_source, self.split_seed, "data.val_conversations")
            train, val = [everything[i] for i in mine], [everything[i] for i in held_out]
        self.examples = self._tokenize(train, module.source, "data.conversations")
        val_examples = self._tokenize(val, module.source, val_option)
        if not self.examples:
            why = f"all are longer than max_tokens={self.max_tokens}"
            why += ", or have nothing to learn (`weight: 0`)" if self.unlearned else ""
            raise InputError(f"`data.conversations`: no row of {self.source!r} is left to train on: {why}.")
        self.val_set = SFTDataset(val_examples, [[i] for i in range(len(val_examples))])

    def _load(self, source: str, option: str) -> list[Conversation]:
        return load_conversations(source, self.columns, self.system_prompt, self.split, option, self.parse_dialogues)

    def _tokenize(self, conversations: Sequence[Conversation], source: Any, option: str) -> list[Example]:
        examples: list[Example] = []
        names: list[str] = []
        every = self.loss_on == "all"

        def add(conversation: Conversation) -> None:
            ids, mask = encode_conversation(
                source.tokenizer,
                conversation.messages,
                source.eos_token_ids,
                every,
                conversation.tools,
                self.chat_template_kwargs,
            )
            if len(ids) > self.max_tokens:
                self.too_long += 1
            elif not any(mask):
                self.unlearned += 1
            else:
                examples.append(Example(ids, mask))
                names.append(conversation.name)

        each_rendered(conversations, add, option)
        source.check_ids(((name, e.ids) for name, e in zip(names, examples, strict=True)), option)
        return examples

    def describe(self) -> str:
        """What there is to train on, in a line."""
        assert self.val_set is not None
        learned = sum(sum(e.mask) for e in self.examples)
        left_out = f"; {self.too_long} left out, longer than {self.max_tokens} tokens" if self.too_long else ""
        if self.unlearned:
            left_out += f"; {self.unlearned} left out, with nothing to learn (weight 0)"
        return (
            f"Conversations: {len(self.examples)} for training ({learned} answer tokens), {len(self.val_set)} held "
            f"out{left_out}"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint notes of the data."""
        return {"rows": self._rows_hash}

    @cached_property
    def _rows_hash(self) -> str:
        """Of the training rows, which stay as they are; every checkpoint asks for it."""
        return rows_fingerprint((list(e.ids), list(e.mask)) for e in self.examples)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with other data than the checkpoint's."""
        refuse_other_rows(state_dict, self.state_dict())

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        trainer, epoch = self.trainer, rounds_done(self.trainer)
        if is_over(trainer):  # a finished run that is started again
            return nothing_left(trainer)
        keep_run_date(trainer)
        order = list(range(len(self.examples)))
        random.Random(f"{self.seed}:{epoch}:pack").shuffle(order)
        lengths = [len(e) for e in self.examples]
        rows = fill_rows(order, lengths, self.max_tokens) if self.packing else [[i] for i in order]
        dataset = SFTDataset(self.examples, rows)
        plan = UpdatePlan(len(dataset), self.batch_size, trainer.accumulate_grad_batches, trainer.world_size)
        return self._loader(dataset, plan, f"{self.seed}:{epoch}", epoch, trains=True)

    def val_dataloader(self) -> Any:
        assert self.trainer is not None
        if self.val_set is None or len(self.val_set) == 0:
            return []
        plan = UpdatePlan(len(self.val_set), self.batch_size, 1, self.trainer.world_size)
        return self._loader(self.val_set, plan, "held-out", 0)

    def _loader(
        self, dataset: SFTDataset, plan: UpdatePlan, order: str, epoch: int, trains: bool = False
    ) -> RoundLoader:
        assert self.trainer is not None
        batches = RoundBatches(plan, order, self.trainer.global_rank, dataset.lengths(), dataset.learned())
        if trains:
            limit_epoch(self.trainer, batches)
        return RoundLoader(dataset, batches, epoch, self.num_workers)
