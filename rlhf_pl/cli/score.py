"""`rlhf-pl score`: rewards of a file of conversations, or their agreement with preference pairs."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from rich.table import Table

from rlhf_pl.algorithms.agreement import PairMetrics, longer_text, pair_metrics
from rlhf_pl.cli.option_numbers import refuse_not_finite
from rlhf_pl.cli.parser_errors import FOR_ALL_COMMANDS, exit_with_error
from rlhf_pl.cli.user_errors import as_user_error
from rlhf_pl.data.conversations import load_conversations
from rlhf_pl.data.files import read_rows
from rlhf_pl.data.preferences import Preferences, load_preferences
from rlhf_pl.models.chat import Message, Tools, message_text
from rlhf_pl.models.chat_template import check_variables
from rlhf_pl.rewards import Reward, RewardResult, Sample, ScoringConfig, as_reward
from rlhf_pl.rewards.combine import isolate_functions
from rlhf_pl.rewards.guard import score_samples, try_reward
from rlhf_pl.rewards.remove_thinking import remove_thinking
from rlhf_pl.utils.console import console, phase
from rlhf_pl.utils.disk import write_atomically
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.run_date import set_run_date
from rlhf_pl.utils.secrets import redacted, register_options

HELP = """Score conversations with a reward.

A row of the data has `messages` that end with a response, or `prompt` and `response`. Rows with `chosen` and `rejected`
are preference pairs: then accuracy (with its 95% interval), mean margin and calibration are reported, and the accuracy
of a choice by length."""


USAGE = """\
usage: rlhf-pl score --reward REWARD --data DATA [options]

  rlhf-pl score --reward my.score --data answers.jsonl --output scored.jsonl
  rlhf-pl score --reward ClassifierReward --reward.model MODEL --data pairs.jsonl

"""


class _Parser(ArgumentParser):
    def format_help(self, formatter: Any = None) -> str:
        options = super().format_help(formatter).partition("\n\n")[2]  # without a usage of 14 lines
        return USAGE + options + FOR_ALL_COMMANDS

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        exit_with_error(str(message), "score", ex)

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        """Serialize a config for `--print_config`, without secrets."""
        return super().dump(redacted(namespace), *args, **kwargs | {"skip_validation": True})


def make_parser() -> ArgumentParser:
    """The parser of `rlhf-pl score`."""
    parser = _Parser(prog="rlhf-pl score", description=HELP, default_env=False)
    parser.add_argument("--config", action="config", help="YAML file with these options.")
    parser.add_argument(
        "--reward", type=Reward | str, required=True, help="A Reward class, or the import path of a Python function."
    )
    parser.add_argument("--data", type=str, required=True, help=".jsonl, .json, .csv or .parquet file, or a Hub id.")
    parser.add_argument("--output", type=str | None, default=None, help="JSON Lines file for the rows with rewards.")
    parser.add_argument("--columns", type=dict[str, str] | None, default=None, help="Names of our columns in the data.")
    parser.add_argument("--split", type=str, default="train", help="Split of a Hub data set.")
    parser.add_argument("--system_prompt", type=str | None, default=None, help="Added to conversations that have none.")
    parser.add_argument(
        "--chat_template_kwargs",
        type=dict[str, Any] | None,
        default=None,
        help="Additional variables of the reward model's chat template, such as '{enable_thinking: false}'.",
    )
    parser.add_argument(
        "--parse_dialogues",
        type=bool,
        default=True,
        help=r"Read text of the form '\n\nHuman: ... \n\nAssistant: ...' as a dialogue.",
    )
    parser.add_argument("--limit", type=int | None, default=None, help="Maximum number of rows to score.")
    parser.add_argument(
        "--on_wrong_pairs",
        type=str,
        default="error",
        choices=["error", "drop"],
        help="What to do with pairs of equal or empty responses.",
    )
    parser.add_class_arguments(ScoringConfig, "scoring", help="How the reward is called.")
    return parser


def run(argv: Sequence[str]) -> int:
    """Run `rlhf-pl score ...`. Return the exit code; raise InputError for wrong inputs."""
    try:
        return _run(argv)
    except InputError as error:  # `fit` has these options under `rollout`
        raise InputError(
            str(error).replace("rollout.scoring", "scoring").replace("rollout.reward", "reward")
        ) from error


def _run(argv: Sequence[str]) -> int:
    parser = make_parser()
    with as_user_error("The command line can't be read"):
        config = parser.parse_args(list(argv))
    register_options(config)
    refuse_not_finite(config)
    with as_user_error("This reward can't be built"):
        given = parser.instantiate_classes(config)
    reward = as_reward(given.reward)
    scoring = given.scoring if isinstance(given.scoring, ScoringConfig) else ScoringConfig(**given.scoring)
    if scoring.isolate:
        isolate_functions(reward)
    if config.limit is not None and config.limit < 1:
        raise InputError(f"`limit` must be 1 or more, got {config.limit}.")
    if config.output is not None and not Path(config.output).resolve().parent.is_dir():
        raise InputError(f"`output`: there is no folder {str(Path(config.output).parent)!r}.")
    _check_variables(reward, config.chat_template_kwargs)
    set_run_date()
    if _has_pairs(config):
        rows = _score_pairs(config, reward, scoring)
    else:
        rows = _score_conversations(config, reward, scoring)
    if config.output is not None:
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        write_atomically(Path(config.output), lambda file: file.writelines(line.encode() for line in lines))
        console.print(f"The rows with their rewards are in {config.output}.", soft_wrap=True)
    return 0


def _check_variables(reward: Reward, given: Mapping[str, Any] | None) -> None:
    """Refuse variables that no reward model's chat template reads."""
    if not given:
        return
    models = [part.renderer() for part in getattr(reward, "parts", [reward]) if hasattr(part, "renderer")]
    templates = {str(i): model.tokenizer.chat_template for i, model in enumerate(models) if not model.pair_encoding}
    if not templates:
        raise InputError(f"`chat_template_kwargs`: {reward.name} has no chat template. Remove it.")
    check_variables(templates, given, "chat_template_kwargs")


def _has_pairs(config: Any) -> bool:
    columns = config.columns or {}
    if {"chosen", "rejected"} & set(columns):
        return True
    for _, row in read_rows(config.data, config.split, "data"):
        return isinstance(row, dict) and {"chosen", "rejected"} <= set(row)
    return False


def _score(reward: Reward, samples: list[Sample], scoring: ScoringConfig) -> list[RewardResult | None]:
    """Score the samples. Responses whose reward failed get the substitute, or None if there is none."""
    try_reward(reward, samples[:2], scoring)
    results: list[RewardResult | None] = []
    # both responses of a pair are in one call
    size = max(1, scoring.prompts_per_call) * 2
    with phase("scoring", len(samples), "responses", sys.stdout.isatty()) as report:
        for start in range(0, len(samples), size):
            outcomes = score_samples(reward, samples[start : start + size], scoring)
            report(len(outcomes), "")
            for outcome in outcomes:
                if isinstance(outcome, RewardResult):
                    results.append(outcome)
                else:
                    results.append(None if scoring.substitute is None else RewardResult(scoring.substitute))
    reward.close()
    return results


def _sample(
    name: str,
    messages: list[Message],
    response: Message,
    columns: Mapping[str, Any],
    tools: Tools | None,
    config: Any,
    scoring: ScoringConfig,
) -> Sample:
    kwargs = config.chat_template_kwargs or {}
    text, message = message_text(response), response if set(response) - {"role", "content", "weight"} else None
    sample = Sample(name, messages, text, columns=columns, message=message, tools=tools, chat_template_kwargs=kwargs)
    return remove_thinking(sample, scoring.thinking_marks) if scoring.strip_thinking else sample


def _score_conversations(config: Any, reward: Reward, scoring: ScoringConfig) -> list[dict[str, Any]]:
    conversations = load_conversations(
        config.data, config.columns, config.system_prompt, config.split, "data", config.parse_dialogues
    )
    conversations = conversations[: config.limit]
    samples = [
        _sample(c.name, c.messages[:-1], c.messages[-1], c.columns, c.tools, config, scoring) for c in conversations
    ]
    results = _score(reward, samples, scoring)
    found = [r for r in results if r is not None]
    if not found:
        raise InputError(f"The reward failed for all {len(samples)} responses.")
    table = Table(title=f"{reward.name} on {len(found)} responses", title_justify="left")
    for header in ("", "mean", "lowest", "highest"):
        table.add_column(header, justify="right" if header else "left")
    for name in ["reward", *found[0].components]:
        values = [r.reward if name == "reward" else r.components.get(name, float("nan")) for r in found]
        table.add_row(name, *(f"{v:.4f}" for v in (sum(values) / len(values), min(values), max(values))))
    console.print(table)
    _print_counts(results)
    return [
        {"prompt_id": c.name, "messages": c.messages, **c.columns, **_as_row(result)}
        for c, result in zip(conversations, results, strict=True)
    ]


def _score_pairs(config: Any, reward: Reward, scoring: ScoringConfig) -> list[dict[str, Any]]:
    loaded: Preferences = load_preferences(
        config.data,
        config.columns,
        config.system_prompt,
        config.split,
        "half",
        config.on_wrong_pairs,
        "data",
        config.parse_dialogues,
    )
    pairs = loaded.pairs[: config.limit]
    samples = [
        _sample(f"pair-{i}", pair.messages, response, pair.columns, pair.tools, config, scoring)
        for i, pair in enumerate(pairs)
        for response in pair.responses
    ]
    results = _score(reward, samples, scoring)
    rows, margins, longer, ties = [], [], [], 0
    for pair, chosen, rejected in zip(pairs, results[::2], results[1::2], strict=True):
        # the whole message if it has more than text
        responses = [r if len(r) > 2 else message_text(r) for r in pair.responses]
        row = {"prompt": pair.messages, "chosen": responses[0], "rejected": responses[1], **pair.columns}
        row |= {"label": pair.label, **_as_row(chosen, "chosen_"), **_as_row(rejected, "rejected_")}
        rows.append(row)
        if chosen is None or rejected is None:
            continue
        if pair.label == 0.5:
            ties += 1
            continue
        margins.append(chosen.reward - rejected.reward)
        longer.append(longer_text(pair.chosen, pair.rejected))
    if not margins:
        raise InputError(f"`data`: {config.data!r} has no scored pair with a preference ({ties} ties).")
    metrics = pair_metrics(margins, longer)
    _print_pairs(reward.name, metrics)
    if metrics.equal:
        console.print(f"{metrics.equal} pairs with equal scores count as half correct.")
    if ties:
        console.print(f"{ties} ties are scored, but not counted.")
    if wrong := loaded.dropped["equal_or_empty"]:
        console.print(f"{wrong} pairs of equal or empty responses are left out.")
    _print_counts(results)
    return rows


def _print_pairs(name: str, metrics: PairMetrics) -> None:
    table = Table(title=f"{name} on {metrics.pairs} pairs", title_justify="left", show_header=False)
    best = max(metrics.longer, 1 - metrics.longer)
    which = "longer" if metrics.longer >= 0.5 else "shorter"
    for what, value in (
        ("accuracy", f"{metrics.accuracy:.4f} (95%: {metrics.low:.4f} to {metrics.high:.4f})"),
        (f"accuracy of choosing the {which} response", f"{best:.4f}"),
        ("margin", f"{metrics.margin:.4f}"),
        ("calibration error", f"{metrics.calibration_error:.4f}"),
        ("Bradley-Terry loss", f"{metrics.loss:.4f} nats"),
    ):
        table.add_row(what, value)
    console.print(table)


def _print_counts(results: Sequence[RewardResult | None]) -> None:
    if failed := sum(r is None for r in results):
        console.print(f"{failed} responses are left out: the reward failed on them.")
    if truncated := sum(r is not None and r.truncated_tokens > 0 for r in results):
        console.print(f"{truncated} conversations were truncated to fit the reward model.")


def _as_row(result: RewardResult | None, prefix: str = "") -> dict[str, Any]:
    if result is None:
        return {f"{prefix}reward": None}
    row: dict[str, Any] = {f"{prefix}reward": result.reward}
    if result.components:
        row[f"{prefix}components"] = dict(result.components)
    if result.truncated_tokens:
        row[f"{prefix}truncated_tokens"] = result.truncated_tokens
    return row
