"""Conversations with their answer as a reward model reads them: its own template and tokens, cut to its length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_pl.models.chat import Message, Tools, spoken
from rlhf_pl.models.chat_template import ChatTemplate
from rlhf_pl.models.score_position import ScoreAt, score_place, tokens_left_off
from rlhf_pl.utils.console import console
from rlhf_pl.utils.errors import InputError

SystemPrompt = Literal["keep", "drop"]
_QUESTION, _ANSWER = "Xqzjw", "Wjzqx"


@dataclass(frozen=True)
class Rendered:
    """A conversation as token ids.

    Args:
        ids: Token ids.
        turn: Position of the first token of what stands between the last prompt message and the answer: the end of
            that message's turn and the assistant's header. None if the template has no such text.
        truncated_tokens: Tokens cut away.
        token_type_ids: Of pair encodings; empty otherwise.
    """

    ids: list[int]
    turn: int | None = None
    truncated_tokens: int = 0
    token_type_ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


class Renderer:
    """Renders conversations by a tokenizer's chat template, cut from the left of the prompt.

    What is too long loses tokens right after its BOS, up to where the answer's turn begins; only an answer that alone
    is too long loses its end.

    Args:
        tokenizer: The reward model's.
        max_tokens: Longest conversation, answer included.
        system_prompt: Whether system messages are rendered.
        pair_encoding: Give the prompt's and the answer's text as a pair instead, for encoders without a chat template.
        option: The option that names the model, for errors.
        score_at: Where the score is read. Rows end there: what the template writes behind it is left off.
        eos: Ids that end an answer, to find that place.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_tokens: int,
        system_prompt: SystemPrompt = "keep",
        pair_encoding: bool = False,
        option: str = "rollout.reward.model",
        score_at: ScoreAt = "last",
        eos: Sequence[int] = (),
    ) -> None:
        self.tokenizer, self.max_tokens, self.system_prompt = tokenizer, max_tokens, system_prompt
        self.pair_encoding, self.option = pair_encoding, option
        self._told: set[str] = set()
        self.score_at: ScoreAt = score_at
        if pair_encoding and score_at != "last":
            raise InputError(f"`score_at` is {score_at}, but `pair_encoding` writes no conversation. Set it to `last`.")
        self.left_off = 0 if pair_encoding else tokens_left_off(score_at, self.ending, eos, option)

    def __call__(
        self,
        messages: Sequence[Message],
        response: str | Message,
        tools: Tools | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        need_tools: bool = False,
    ) -> Rendered:
        """The conversation with `response` as its last message.

        Args:
            messages: What stands before it.
            response: Its text, or the assistant's message.
            tools: What the chat template is given as `tools`.
            chat_template_kwargs: Further variables of the chat template.
            need_tools: Whether a template that leaves the tools or whole messages out is an error; else that is said
                once.

        Raises:
            InputError: The template refuses it, or would leave tool calls out.
        """
        if self.system_prompt == "drop":
            messages = [m for m in messages if m["role"] != "system"]
        last = {"role": "assistant", "content": response} if isinstance(response, str) else response
        if self.pair_encoding:
            if tools:
                self._lacks_tools(need_tools)
            return self._as_pair("\n\n".join(map(spoken, messages)), spoken(last))
        text = self._render([*messages, last], tools, chat_template_kwargs, need_tools)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=self.tokenizer.is_fast)
        ids = list(encoded["input_ids"])
        ids = ids[: len(ids) - self.left_off]
        turn = self._turn_position(text, ids, encoded)
        return self._cut(ids, turn)

    def _render(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        need_tools: bool = False,
    ) -> str:
        template = ChatTemplate(self.tokenizer, chat_template_kwargs)
        try:
            prepared = template.prepare(messages, tools, need_tools)
            text = template.render(prepared, tools)
        except InputError as error:
            system = any(m["role"] == "system" for m in messages)
            hint = " Give `system_prompt: drop` to leave system messages out." if system else ""
            raise InputError(f"`{self.option}`: {error}.{hint}") from error
        if tools and not need_tools and not template.writes_tools(prepared, tools, text):
            self._lacks_tools()
        if not need_tools and (lost := template.lost(prepared, text, tools)):
            role = prepared[lost[0]]["role"]
            self._say_once(f"messages of the role {role!r} are not written for this model: it scores without them.")
        return text

    def _lacks_tools(self, is_error: bool = False) -> None:
        """Say once that the model does not get to see the tools."""
        if is_error:
            raise InputError(f"`{self.option}`: a pair of texts has no place for the `tools` of this row.")
        self._say_once("the data's tools are not written for this model: it scores without seeing them.")

    def _say_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            console.print(f"`{self.option}`: {line}", soft_wrap=True)

    @cached_property
    def turn_text(self) -> str:
        """What the template writes between the last message of the prompt and the answer; empty if that can't be told.

        Found by rendering a conversation whose texts are known.
        """
        text, start, end = self._known
        return text[start + len(_QUESTION) : end] if 0 <= start < end else ""

    @cached_property
    def ending(self) -> list[int]:
        """Ids of what the template writes after the answer; empty if that can't be told."""
        if self.pair_encoding:
            return []
        text, _, end = self._known
        rest = text[end + len(_ANSWER) :] if end >= 0 else ""
        return list(self.tokenizer(rest, add_special_tokens=False)["input_ids"]) if rest else []

    @cached_property
    def _known(self) -> tuple[str, int, int]:
        """A conversation whose texts are known, and where they begin in it."""
        text = self._render([{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}])
        return text, text.find(_QUESTION), text.rfind(_ANSWER)

    def _turn_position(self, text: str, ids: list[int], encoded: Any) -> int | None:
        """The token at which the last `turn_text` begins."""
        start = text.rfind(self.turn_text) if self.turn_text else -1
        if start < 0:
            return None
        if not self.tokenizer.is_fast:
            return len(self.tokenizer(text[:start], add_special_tokens=False)["input_ids"])
        return next((i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > start), None)

    def _cut(self, ids: list[int], turn: int | None) -> Rendered:
        overflow = max(0, len(ids) - self.max_tokens)
        if overflow == 0:
            return Rendered(ids, turn)
        start = 1 if ids and ids[0] == self.tokenizer.bos_token_id else 0
        end = len(ids) if turn is None else turn
        cut = min(overflow, max(0, end - start))
        kept = (ids[:start] + ids[start + cut :])[: self.max_tokens]
        return Rendered(kept, None if turn is None else turn - cut, overflow)

    def _as_pair(self, prompt: str, response: str) -> Rendered:
        tokenizer = self.tokenizer
        whole = tokenizer(prompt, response)
        overflow = max(0, len(whole["input_ids"]) - self.max_tokens)
        if overflow:
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            prompt = tokenizer.decode(ids[overflow:], skip_special_tokens=False) if overflow < len(ids) else ""
            whole = tokenizer(prompt, response, truncation=True, max_length=self.max_tokens)
        return Rendered(list(whole["input_ids"]), None, overflow, tuple(whole.get("token_type_ids", ())))


def reward_tokenizer(source: Any, pair_encoding: bool) -> Any:
    """The tokenizer of a reward model; it needs a chat template unless pairs are encoded."""
    if not pair_encoding:
        return source.tokenizer
    from transformers import AutoTokenizer

    return source.read("tokenizer", AutoTokenizer)


def reward_renderer(
    source: Any,
    max_tokens: int,
    system_prompt: SystemPrompt,
    pair_encoding: bool = False,
    score_at: ScoreAt | None = None,
    option: str | None = None,
    tokenizer: Any = None,
) -> Renderer:
    """Renders conversations as the reward model of `source` reads them.

    Args:
        source: Its config and tokenizer.
        max_tokens: See `Renderer`.
        system_prompt: See `Renderer`.
        pair_encoding: See `Renderer`.
        score_at: Where the score is read; None for where its config says, else the last token.
        option: The option that names the model, for errors; None for that of `source`.
        tokenizer: If not that of `source`.
    """
    tokenizer = tokenizer or reward_tokenizer(source, pair_encoding)
    place = score_place(score_at, source)
    eos = () if place == "last" else source.eos_token_ids
    return Renderer(tokenizer, max_tokens, system_prompt, pair_encoding, option or source.option, place, eos)


def padded(rows: Sequence[Rendered], pad_id: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and, where rows have them, `token_type_ids`, padded on the right, shape (R, T)."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros_like(ids)
    types = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row.ids)
        mask[i, : len(row)] = 1
        if row.token_type_ids:
            types[i, : len(row)] = torch.tensor(row.token_type_ids)
    batch = {"input_ids": ids, "attention_mask": mask}
    if any(row.token_type_ids for row in rows):
        batch["token_type_ids"] = types
    return {name: tensor.to(device) for name, tensor in batch.items()}
