"""Pairs with rewards that someone else sampled and scored: rows, and the DataModule that trains on them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rlhf_pl.checkpointing.progress import rounds_done, run_seed
from rlhf_pl.data.base_datamodule import PairsDataModule
from rlhf_pl.data.files import Row, check_columns, parse_rows
from rlhf_pl.data.held_out import split_groups
from rlhf_pl.data.message_reader import MessageReader
from rlhf_pl.data.options import check_module
from rlhf_pl.data.overflow import refuse_overflow
from rlhf_pl.data.pair_batches import PairDataset, RoundBatches, RoundLoader
from rlhf_pl.data.preferences import EqualAnswersError, number_of, parse_answers
from rlhf_pl.data.run_limits import is_over, limit_epoch, nothing_left
from rlhf_pl.models.chat import Message, Tools, encode_conversation, encode_prompt, spoken, with_system_prompt
from rlhf_pl.models.chat_template import check_template_kwargs
from rlhf_pl.store.round_store import Round, RoundStore
from rlhf_pl.utils.errors import InputError, at_least, finite
from rlhf_pl.utils.run_date import keep_run_date, take_run_date

# our names, and what the published data sets of REBEL's authors call them
ALIASES = {
    "prompt_id": (),
    "prompt": (),
    "chosen": (),
    "rejected": ("reject",),
    "chosen_reward": (),
    "rejected_reward": ("reject_reward",),
    "prompt_tokens": ("llama_prompt_tokens",),
    "chosen_tokens": ("llama_chosen_tokens",),
    "rejected_tokens": ("llama_reject_tokens",),
    "chosen_logprob": (),
    "rejected_logprob": ("reject_logprob",),
    "tools": (),
}
_TOKENS = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
_LOGPROBS = ("chosen_logprob", "rejected_logprob")


@dataclass(frozen=True)
class OfflinePair:
    """A pair with its rewards.

    Args:
        prompt_id: The row's.
        prompt_tokens: Token ids up to where the answers start.
        texts: The answers, chosen first; a tool call as JSON.
        tokens: Their token ids, EOS included.
        rewards: Theirs, reward units.
        logps: Their summed log-probs under the policy that drew them, nats; None if unknown.
    """

    prompt_id: str
    prompt_tokens: Sequence[int]
    texts: tuple[str, str]
    tokens: tuple[Sequence[int], Sequence[int]]
    rewards: tuple[float, float]
    logps: tuple[float, float] | None


class OfflineDataModule(PairsDataModule):
    """Pairs with rewards as the one round of a run that samples nothing.

    A row has `prompt`, `chosen`, `rejected`, `chosen_reward` and `rejected_reward`; the columns of the authors'
    published data (`reject`, `llama_chosen_tokens`, `chosen_logprob`, ...) are known. Token columns are trained on as
    they are, without their padding. The log-probs of the old policy are computed once, from the policy as it starts,
    and kept in the run directory. Every epoch is one more pass over the same pairs.

    Args:
        pairs: A .jsonl, .json, .csv or .parquet file, or a Hub id.
        columns: What your data calls the columns, such as `{"rejected_reward": "worst_score"}`.
        split: Split of a Hub data set.
        system_prompt: Put in front of conversations that have none.
        chat_template_kwargs: Further variables of the chat template, such as `{enable_thinking: false}`.
        parse_dialogues: Take texts of the form `\\n\\nHuman: ... \\n\\nAssistant: ...` for dialogues, and say how many
            rows are such.
        temperature: What the answers were drawn at; log-probs are at this temperature.
        use_tokens: Take token columns where they are there, instead of tokenizing the texts.
        use_logprobs: Take log-prob columns where they are there (they need the token columns).
        max_prompt_tokens: Pairs with longer prompts are left out and counted.
        max_response_tokens: Pairs with longer answers are left out and counted.
        val_pairs: Held out: a share below 1, a number of pairs, or a file or Hub id of such.
        split_seed: Chooses the held-out prompts.
        batch_size: Pairs per micro-batch and device. An update sees batch_size x accumulate_grad_batches x devices.
        max_tokens_per_batch: Tokens of a micro-batch at most (a single longer pair aside), prompts counted once. An
            update then has the same pairs, divided into as many micro-batches as that takes; null for batch_size pairs
            in each.
        num_workers: Loader processes.
        seed: Shuffles the pairs; null takes the run's `seed_everything`.
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
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, max_tokens_per_batch)
        at_least(
            "data",
            max_prompt_tokens=(max_prompt_tokens, 1),
            max_response_tokens=(max_response_tokens, 1),
            batch_size=(batch_size, 1),
            max_tokens_per_batch=(max_tokens_per_batch, 1),
            num_workers=(num_workers, 0),
        )
        finite("data", temperature=temperature)
        if not temperature > 0:
            raise InputError(f"`data.temperature` must be above 0, got {temperature}.")
        self.source, self.columns, self.split, self.system_prompt = pairs, columns, split, system_prompt
        self.chat_template_kwargs, self.parse_dialogues = chat_template_kwargs or {}, parse_dialogues
        self.temperature, self.use_tokens, self.use_logprobs = temperature, use_tokens, use_logprobs
        self.max_prompt_tokens, self.max_response_tokens = max_prompt_tokens, max_response_tokens
        self.val_source, self.split_seed = val_pairs, split_seed
        self.num_workers, self._seed = num_workers, seed
        self.train_set: list[OfflinePair] = []
        self.val_set: list[OfflinePair] = []
        self.dropped: dict[str, int] = {}
        self.prepare_round: Callable[[], None] | None = None

    @property
    def seed(self) -> int:
        """The run's seed."""
        return run_seed() if self._seed is None else self._seed

    @property
    def longest_tokens(self) -> int:
        """Of the longest prompt with its response."""
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
        check_module(module, self, "RebelModule")
        check_template_kwargs(module.source.tokenizer, self.chat_template_kwargs, "data.chat_template_kwargs")
        take_run_date(self._trainer)
        pairs = self._load(self.source, "data.pairs", module.source)
        if isinstance(self.val_source, str):
            self.train_set, self.val_set = pairs, self._load(self.val_source, "data.val_pairs", module.source)
            return
        keys = [repr(list(p.prompt_tokens)) for p in pairs]
        train, val = split_groups(keys, self.val_source, self.split_seed, "data.val_pairs")
        self.train_set, self.val_set = [pairs[i] for i in train], [pairs[i] for i in val]

    def _load(self, source: str, option: str, model: Any) -> list[OfflinePair]:
        names = check_columns(self.columns, tuple(ALIASES))
        reader = MessageReader(self.parse_dialogues)

        def parse(where: str, number: int, row: Row) -> OfflinePair | None:
            columns = {ours: _column(ours, row, names) for ours in ALIASES}
            found = self._parse(row, columns, number, model, reader)
            if isinstance(found, str):
                self.dropped[found] = self.dropped.get(found, 0) + 1
                return None
            return found

        pairs = [pair for pair in parse_rows(source, self.split, option, parse) if pair is not None]
        reader.report(option)
        model.check_ids(((p.prompt_id, ids) for p in pairs for ids in (p.prompt_tokens, *p.tokens)), option)
        if not pairs:
            raise InputError(f"`{option}`: no row of {source!r} is left to train on: {self._left_out()}.")
        return pairs

    def _parse(
        self, row: Row, columns: Mapping[str, str], number: int, model: Any, reader: MessageReader
    ) -> OfflinePair | str:
        """A pair, or the reason to leave it out."""
        for name in ("chosen_reward", "rejected_reward"):
            if row.get(columns[name]) in (None, ""):
                found = ", ".join(map(str, row))
                raise InputError(f"no `{columns[name]}`; found {found}. Name yours with --data.columns.{name}")
        rewards = (number_of(row, columns["chosen_reward"], 0.0), number_of(row, columns["rejected_reward"], 0.0))
        try:
            before, *responses = parse_answers(row, columns, reader)
        except EqualAnswersError:
            return "equal answers"
        module: Any = self._trainer.lightning_module
        if rewards[0] == rewards[1] and module.kl_coef == 0:
            return "equal rewards"
        texts = [spoken(response) for response in responses]
        has_tokens = self.use_tokens and all(row.get(columns[name]) is not None for name in _TOKENS)
        if has_tokens:
            prompt, *answers = (_without_padding(row[columns[name]], columns[name], model) for name in _TOKENS)
            _check_tokenizer(answers[0], texts[0], columns["chosen_tokens"], model.tokenizer)
        else:
            messages, tools = with_system_prompt(before, self.system_prompt), reader.tools(row, columns["tools"])
            prompt = encode_prompt(model.tokenizer, messages, tools, self.chat_template_kwargs)
            answers = [self._encode([*messages, response], tools, model) for response in responses]
        if len(prompt) > self.max_prompt_tokens:
            return "long prompts"
        if max(map(len, answers)) > self.max_response_tokens:
            return "long answers"
        logps = None
        if has_tokens and self.use_logprobs and all(row.get(columns[name]) is not None for name in _LOGPROBS):
            logps = (number_of(row, columns["chosen_logprob"], 0.0), number_of(row, columns["rejected_logprob"], 0.0))
        if rewards[0] == rewards[1] and logps is None and module.reference_source is module.source:
            return "equal rewards"  # which the KL term, of the policy from itself, leaves equal
        given = row.get(columns["prompt_id"])
        prompt_id = f"row-{number}" if given is None else str(given)
        return OfflinePair(prompt_id, prompt, (texts[0], texts[1]), (answers[0], answers[1]), rewards, logps)

    def _encode(self, messages: list[Message], tools: Tools | None, model: Any) -> list[int]:
        """The token ids of the last message, as if it had been sampled and come to its end."""
        ids, mask = encode_conversation(
            model.tokenizer,
            [*messages[:-1], messages[-1] | {"weight": 1}],
            model.eos_token_ids,
            False,
            tools,
            self.chat_template_kwargs,
        )
        return [token for token, answer in zip(ids, mask, strict=True) if answer]

    def _left_out(self) -> str:
        return ", ".join(f"{count} of {reason}" for reason, count in self.dropped.items()) or "none"

    def describe(self) -> str:
        """What there is to train on, in a line."""
        left_out = f"; left out: {self._left_out()}" if self.dropped else ""
        return f"Pairs: {len(self.train_set)} for training, {len(self.val_set)} held out{left_out}"

    def train_dataloader(self) -> Any:
        if is_over(self._trainer):  # a finished run that is started again
            return nothing_left(self._trainer)
        epoch = rounds_done(self._trainer)
        keep_run_date(self._trainer)
        if self.prepare_round is not None:
            self.prepare_round()
        dataset = self._pairs(self.stored)
        batches = limit_epoch(self._trainer, self._batches(epoch, dataset))
        return RoundLoader(dataset, batches, epoch, self.num_workers)

    def divide(self, epoch: int) -> RoundBatches:
        return self._batches(epoch, self._pairs(self.stored))

    def training_steps(self, epoch: int, lengths: Sequence[int]) -> list[list[list[int]]]:
        """How `epoch` trains on pairs of these lengths: those of each micro-batch, of each rank."""
        return self._divide(f"{self.seed}:{epoch}", len(lengths), lengths).steps()

    def _batches(self, epoch: int, dataset: PairDataset) -> RoundBatches:
        return self._divide(f"{self.seed}:{epoch}", len(dataset), dataset.lengths())

    def val_dataloader(self) -> Any:
        if not self.val_set:
            return []
        if self.prepare_round is not None:
            self.prepare_round()
        dataset = self._pairs(self.stored_held_out)
        batches = self._held_out_batches(len(dataset), dataset.lengths())
        return RoundLoader(dataset, batches, 0, self.num_workers)

    def _pairs(self, stored: Round) -> PairDataset:
        if not stored.is_complete("logps"):
            raise InputError(f"The log-probs of {stored.path} are missing: give the Trainer OfflineLogps().")
        pairs = PairDataset(stored.read("pairs"), stored.read("logps"), self.temperature)
        refuse_overflow(self._trainer.lightning_module, pairs, "`data.pairs`")
        return pairs


def _column(ours: str, row: Row, names: Mapping[str, str]) -> str:
    """What this data calls one of our columns."""
    if ours in names:
        return names[ours]
    return next((name for name in (ours, *ALIASES[ours]) if name in row), ours)


def _without_padding(ids: Any, column: str, model: Any) -> list[int]:
    """Token ids without the padding at their ends: ids outside of the vocabulary, and padding that is no EOS."""
    if not isinstance(ids, list | tuple) or not all(isinstance(i, int) for i in ids):
        raise InputError(f"`{column}` is {type(ids).__name__}; expected a list of token ids")
    padding = model.tokenizer.pad_token_id
    size = len(model.tokenizer)
    inside = [0 <= i < size and not (i == padding and padding not in model.eos_token_ids) for i in ids]
    if True not in inside:
        raise InputError(f"`{column}` holds nothing but padding")
    first, last = inside.index(True), len(inside) - inside[::-1].index(True)
    if not all(inside[first:last]):
        raise InputError(f"`{column}` has ids outside of this tokenizer's vocabulary of {size}: another model's?")
    return list(ids[first:last])


def _check_tokenizer(ids: Sequence[int], text: str, column: str, tokenizer: Any) -> None:
    """The token columns must be of the policy's tokenizer."""
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    if "".join(decoded.split()) != "".join(text.split()):
        raise InputError(
            f"`{column}` reads {decoded[:60]!r} with this policy's tokenizer, but the text is {text[:60]!r}: it is of "
            "another model. `data.use_tokens: false` tokenizes the texts"
        )


def as_table(pairs: Sequence[OfflinePair], schema: pa.Schema) -> pa.Table:
    """Pairs as the `pairs` stage of a round."""
    rows = [
        {
            "prompt_id": pair.prompt_id,
            "chosen_index": 0,
            "rejected_index": 1,
            "chosen": pair.texts[0],
            "rejected": pair.texts[1],
            "chosen_reward": pair.rewards[0],
            "rejected_reward": pair.rewards[1],
            "prompt_tokens": pair.prompt_tokens,
            "chosen_tokens": pair.tokens[0],
            "rejected_tokens": pair.tokens[1],
        }
        for pair in pairs
    ]
    return pa.Table.from_pylist(rows, schema=schema)
