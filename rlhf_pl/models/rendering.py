"""Renders conversations with a response for a reward model: its own template and tokens, truncated to its length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_pl.models.chat import Message, Tools, plain_text
from rlhf_pl.models.chat_template import ChatTemplate
from rlhf_pl.models.score_position import ScoreAt, count_trailing_tokens, resolve_score_at
from rlhf_pl.utils.console import console
from rlhf_pl.utils.errors import InputError

SystemPrompt = Literal["keep", "drop"]
_PROMPT, _RESPONSE = "Xqzjw", "Wjzqx"


@dataclass(frozen=True)
class Rendered:
    """A conversation as token ids.

    Args:
        ids: Token ids.
        turn: Position of the first token between the last prompt message and the response: the end of that message's
            turn and the assistant's header. None if the template has no such text.
        truncated_tokens: Number of removed tokens.
        token_type_ids: Token types of pair encodings; empty otherwise.
    """

    ids: list[int]
    turn: int | None = None
    truncated_tokens: int = 0
    token_type_ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


class Renderer:
    """Renders conversations by a tokenizer's chat template, and truncates the prompt from the left.

    Conversations that are too long lose tokens after their BOS, up to the start of the response's turn. Only a response
    that is too long by itself loses its end.

    Args:
        tokenizer: The reward model's tokenizer.
        max_tokens: Maximum length of a conversation, including the response.
        system_prompt: Whether system messages are rendered.
        pair_encoding: Encode the texts of prompt and response as a pair, for encoders without a chat template.
        option: The option that names the model, for errors.
        score_at: The token at which the score is read. Rows end there: later tokens of the template are removed.
        eos: Ids of EOS tokens, to find that token.
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
        self._reported: set[str] = set()
        self.score_at: ScoreAt = score_at
        if pair_encoding and score_at != "last":
            raise InputError(
                f"`score_at` is {score_at}, but `pair_encoding` does not render a conversation. Set it to `last`."
            )
        self.trailing_tokens = 0 if pair_encoding else count_trailing_tokens(score_at, self.ending, eos, option)

    @property
    def settings(self) -> list[Any]:
        """What its rows depend on beside tokenizer and template."""
        return [self.max_tokens, self.system_prompt, self.pair_encoding, self.score_at, self.trailing_tokens]

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
            messages: The messages before the response.
            response: The response's text, or the assistant's message.
            tools: The chat template's variable `tools`.
            chat_template_kwargs: Further variables of the chat template.
            need_tools: Whether it is an error if the template omits the tools or whole messages; otherwise that is
                reported once.

        Raises:
            InputError: The template rejects the conversation, or would omit tool calls.
        """
        if self.system_prompt == "drop":
            messages = [m for m in messages if m["role"] != "system"]
        last = {"role": "assistant", "content": response} if isinstance(response, str) else response
        if self.pair_encoding:
            if tools:
                self._report_unseen_tools(need_tools)
            return self._encode_pair("\n\n".join(map(plain_text, messages)), plain_text(last))
        text = self._render([*messages, last], tools, chat_template_kwargs, need_tools)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=self.tokenizer.is_fast)
        ids = list(encoded["input_ids"])
        ids = ids[: len(ids) - self.trailing_tokens]
        turn = self._turn_position(text, ids, encoded)
        return self._truncate(ids, turn)

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
            hint = " Set `system_prompt: drop` to omit system messages." if system else ""
            raise InputError(f"`{self.option}`: {error}.{hint}") from error
        if tools and not need_tools and not template.writes_tools(prepared, tools, text):
            self._report_unseen_tools()
        if not need_tools and (lost := template.find_lost_messages(prepared, text, tools)):
            role = prepared[lost[0]]["role"]
            self._note_once(f"this model's template omits messages of the role {role!r}: it scores without them.")
        return text

    def _report_unseen_tools(self, is_error: bool = False) -> None:
        """Report once that the model does not see the tools, or raise an error."""
        if is_error:
            raise InputError(f"`{self.option}`: a pair of texts can't contain the `tools` of this row.")
        self._note_once("this model's input omits the data's tools: it scores without seeing them.")

    def _note_once(self, line: str) -> None:
        if line not in self._reported:
            self._reported.add(line)
            console.print(f"`{self.option}`: {line}", soft_wrap=True)

    @cached_property
    def turn_text(self) -> str:
        """The template's text between the last message of the prompt and the response; empty if it is unknown.

        Found by rendering a conversation with known texts.
        """
        text, start, end = self._probe
        return text[start + len(_PROMPT) : end] if 0 <= start < end else ""

    @cached_property
    def ending(self) -> list[int]:
        """Ids of the template's text after the response; empty if it is unknown."""
        if self.pair_encoding:
            return []
        text, _, end = self._probe
        rest = text[end + len(_RESPONSE) :] if end >= 0 else ""
        return list(self.tokenizer(rest, add_special_tokens=False)["input_ids"]) if rest else []

    @cached_property
    def _probe(self) -> tuple[str, int, int]:
        """A rendered conversation with known texts, and the positions of the two texts."""
        text = self._render([{"role": "user", "content": _PROMPT}, {"role": "assistant", "content": _RESPONSE}])
        return text, text.find(_PROMPT), text.rfind(_RESPONSE)

    def _turn_position(self, text: str, ids: list[int], encoded: Any) -> int | None:
        """Index of the token at which the last `turn_text` starts."""
        start = text.rfind(self.turn_text) if self.turn_text else -1
        if start < 0:
            return None
        if not self.tokenizer.is_fast:
            return len(self.tokenizer(text[:start], add_special_tokens=False)["input_ids"])
        return next((i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > start), None)

    def _truncate(self, ids: list[int], turn: int | None) -> Rendered:
        overflow = max(0, len(ids) - self.max_tokens)
        if overflow == 0:
            return Rendered(ids, turn)
        start = 1 if ids and ids[0] == self.tokenizer.bos_token_id else 0
        end = len(ids) if turn is None else turn
        removed = min(overflow, max(0, end - start))
        kept = (ids[:start] + ids[start + removed :])[: self.max_tokens]
        return Rendered(kept, None if turn is None else turn - removed, overflow)

    def _encode_pair(self, prompt: str, response: str) -> Rendered:
        tokenizer = self.tokenizer
        whole = tokenizer(prompt, response)
        overflow = max(0, len(whole["input_ids"]) - self.max_tokens)
        if overflow:
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            prompt = tokenizer.decode(ids[overflow:], skip_special_tokens=False) if overflow < len(ids) else ""
            whole = tokenizer(prompt, response, truncation=True, max_length=self.max_tokens)
        return Rendered(list(whole["input_ids"]), None, overflow, tuple(whole.get("token_type_ids", ())))


def reward_tokenizer(source: Any, pair_encoding: bool) -> Any:
    """The tokenizer of a reward model; it needs a chat template unless `pair_encoding` is set."""
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
    """A renderer of conversations for the reward model of `source`.

    Args:
        source: The model's config and tokenizer.
        max_tokens: See `Renderer`.
        system_prompt: See `Renderer`.
        pair_encoding: See `Renderer`.
        score_at: Where the score is read; None for the config's value, or else the last token.
        option: The option that names the model, for errors; None for that of `source`.
        tokenizer: Another tokenizer than that of `source`.
    """
    tokenizer = tokenizer or reward_tokenizer(source, pair_encoding)
    place = resolve_score_at(score_at, source)
    eos = () if place == "last" else source.eos_token_ids
    return Renderer(tokenizer, max_tokens, system_prompt, pair_encoding, option or source.option, place, eos)


def pad_rows(rows: Sequence[Rendered], pad_id: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Right-padded `input_ids`, `attention_mask` and, if rows have them, `token_type_ids`, each of shape (R, T)."""
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
