"""The conversations whose mean score a reward model subtracts: its scores are then centred at 0."""

from collections.abc import Mapping
from typing import Any

from rlhf_pl.data.conversations import Conversation, load_conversations
from rlhf_pl.data.preference_batches import unpack_row
from rlhf_pl.data.tokenizing import Recipe, iterate_token_lists, make_token_table
from rlhf_pl.models.rendering import Rendered, Renderer
from rlhf_pl.models.source import ModelSource

OPTION = "data.center_on"


def load_centering_rows(
    source: str,
    split: str,
    system_prompt: str | None,
    parse_dialogues: bool,
    render: Renderer,
    model: ModelSource,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Rendered]:
    """Read conversations that end with a response, rendered for a reward model; long ones are truncated.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, or a Hub id.
        split: Split of a Hub data set.
        system_prompt: Prepended to conversations without a system prompt.
        parse_dialogues: Whether text in the form of a dialogue becomes messages.
        render: Renderer of the reward model.
        model: The reward model's tokenizer and config.
        chat_template_kwargs: Further variables of the chat template.

    Raises:
        InputError: The source can't be read, or rows are invalid.
    """
    conversations = load_conversations(source, None, system_prompt, split, OPTION, parse_dialogues)

    def encode(conversation: Conversation) -> list[Any]:
        *before, response = conversation.messages
        row = render(before, response, conversation.tools, chat_template_kwargs, True)
        return [row.ids, [-1 if row.turn is None else row.turn, row.truncated_tokens], row.token_type_ids]

    recipe = Recipe(render.tokenizer, [render.settings, chat_template_kwargs], OPTION, threads=not render.pair_encoding)
    names = ["ids", "facts", "types"]
    table = make_token_table(conversations, encode, names, recipe, lambda c: [c.messages, c.tools])
    columns = zip(*(iterate_token_lists(table, name) for name in names), strict=True)
    rows = [unpack_row(*row) for row in columns]
    model.check_ids(((c.name, row.ids) for c, row in zip(conversations, rows, strict=True)), OPTION)
    return rows
