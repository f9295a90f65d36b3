"""`rlhf-pl rounds RUN_DIR`: shows the contents of a run directory. Reads only, also during the run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rlhf_pl.checkpointing.checkpoints import FOLDER
from rlhf_pl.cli.parser_errors import CommandParser
from rlhf_pl.data.round_choice import ENTRY
from rlhf_pl.models.chat import message_text
from rlhf_pl.models.export_stamp import find_damaged_files, find_exports
from rlhf_pl.rounds.metrics import KL_NOTE, describe_margins, format_reward, without_bins
from rlhf_pl.rounds.report.left_out import describe_left_out
from rlhf_pl.store.check import find_problems
from rlhf_pl.store.round_store import GIVEN, ORDER, STAGES, Round, RoundStore
from rlhf_pl.store.waves import count_waves, shard_ranges
from rlhf_pl.utils.console import console
from rlhf_pl.utils.disk import format_bytes
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.terminal import print_wrong_input


def run(argv: Sequence[str]) -> int:
    """Run `rlhf-pl rounds ...`. Return the exit code."""
    if not console.is_terminal:
        console.width = 120
    parser = CommandParser(
        prog="rlhf-pl rounds",
        example="rlhf-pl rounds runs/quickstart\nrlhf-pl rounds runs/quickstart --round 1 --samples 3",
        description="Show the rounds of a run: stages, counts, rewards, settings, times, missing parts. Reads only.",
    )
    parser.add_argument("run_dir", help="the run directory (`trainer.default_root_dir`)")
    parser.add_argument("--round", type=int, metavar="N", help="show all details of one round, counted from 1")
    parser.add_argument(
        "--samples", type=int, default=0, metavar="K", help="with --round: show K prompts with their responses"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare every file, exported models too, with its checksum"
    )
    arguments = parser.parse_args(argv)
    try:
        return show(Path(arguments.run_dir), arguments.round, arguments.samples, arguments.verify)
    except InputError as error:
        print_wrong_input(error)
        return 1


def show(run_dir: Path, number: int | None, samples: int, verify: bool) -> int:
    """Print the overview, or one round. Return the exit code, 1 if damage is found.

    Args:
        run_dir: The run directory.
        number: Round to show, counted from 1; None for the overview.
        samples: Prompts to show with their responses.
        verify: Whether to compare all files with their checksums.

    Raises:
        InputError: The directory does not hold this round, or any rounds.
    """
    store = RoundStore(run_dir)
    if samples and number is None:
        raise InputError("`--samples` shows responses of one round: name it with --round N.")
    if samples < 0:
        raise InputError(f"`--samples` must be 0 or more, got {samples}.")
    if not run_dir.is_dir():
        raise InputError(f"There is no folder {str(run_dir)!r}.")
    exports = list(find_exports(run_dir))
    if not store.rounds() and not store.evaluations() and not (verify and exports):
        raise InputError(
            f"{str(run_dir)!r} holds no rounds: it is not a run directory, or its run has not begun one yet."
        )
    if number is None and (store.rounds() or store.evaluations()):
        console.print(make_overview(store))
        if store.evaluations():
            console.print(make_evaluations_table(store))
    elif number is not None:
        if number - 1 not in store.rounds():
            numbers = ", ".join(str(index + 1) for index in store.rounds()) or "none"
            raise InputError(f"Round {number} is not in {str(run_dir)!r}; its rounds: {numbers}.")
        console.print(make_details(store.round(number - 1)))
        for panel in make_sample_panels(store.round(number - 1), samples):
            console.print(panel)
    damaged = [file for folder in exports for file in find_damaged_files(folder, checksums=verify)]
    for file in damaged:
        console.print(f"damaged or missing: {file}", style="red", soft_wrap=True)
    if damaged:
        console.print(
            "Run the run's own command to export the final model and the last round's again. To export that of round "
            "N, run the same command with --trainer.max_epochs N, --ckpt_path "
            f"{run_dir / FOLDER}/after-round-N.ckpt (N of 4 digits) and another --trainer.default_root_dir; its "
            "checkpoint must still exist.",
            soft_wrap=True,
        )
    if not verify:
        return 0
    problems = find_problems(store)
    for line in problems.lines():
        console.print(line, style="red", soft_wrap=True)
    if problems:
        console.print("Run the run's own command with --repair to recreate these.")
    if not problems and not damaged:
        console.print("Every file matches its checksum.")
    return 1 if problems or damaged else 0


def make_overview(store: RoundStore) -> Group:
    """A table with a line per round, and what was left out of each."""
    table = Table(title=f"Rounds of {store.run_dir}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = ("round", "prompts", "responses", "scored", "pairs", "reward", "std", "best", "worst", "tokens",
               "KL(old||new)", "loss", "time", "state")  # fmt: skip
    for name in columns:
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=name != "state")
    notes = []
    for index, stored in store.rounds().items():
        try:
            manifest = stored.manifest
        except InputError:
            table.add_row(str(index + 1), *["-"] * (len(columns) - 2), "manifest damaged")
            continue
        table.add_row(str(index + 1), *_cells(manifest["stages"], manifest.get("prompts", {})), describe_state(stored))
        if margins := describe_margins(manifest):
            notes.append(Text(f"round {index + 1}: {margins}"))
        if reasons := describe_left_out(manifest["stages"]):
            notes.append(Text(f"round {index + 1}, left out: {reasons}"))
        if (waves := count_waves(manifest)) and waves["refilled"]:
            listed = " + ".join(map(str, waves["waves"]))
            notes.append(Text(f"round {index + 1}, prompts refilled: {waves['refilled']} ({listed})"))
        notes += [Text(f"round {index + 1}, warning: {text}", style="yellow")
                  for text in manifest.get("warnings", {}).values()]  # fmt: skip
    return Group(table, Text(KL_NOTE, style="dim"), *notes)


def _cells(stages: dict[str, dict[str, Any]], prompts: dict[str, int]) -> list[str]:
    responses, rewards, pairs, training = (stages.get(n, {}) for n in ("responses", "rewards", "pairs", "training"))
    return [
        _text(prompts.get("in_round")),
        _text(responses.get("responses")),
        _text(rewards.get("scored")),
        _text(pairs.get("pairs")),
        *(_text(rewards.get(name), 3) for name in ("mean", "std", "best", "worst")),
        _text(responses.get("tokens_mean"), 0),
        _text(training.get("kl"), 2),
        _text(training.get("loss"), 3),
        f"{sum(stage.get('seconds', 0.0) for stage in stages.values()):.0f} s",
    ]


def _text(value: Any, digits: int | None = None) -> str:
    return "-" if value is None else str(value) if digits is None else f"{value:.{digits}f}"


def describe_state(stored: Round) -> str:
    """`complete`, or the progress of the first incomplete stage."""
    manifest = stored.manifest
    shards = len(shard_ranges(manifest, manifest.get("prompts", {}).get("in_round", 0)))
    names = STAGES if stored.is_held_out else ORDER
    for name in names:
        if manifest["stages"].get(name, {}).get("complete") or (name == GIVEN and name not in manifest["stages"]):
            continue
        if stored.is_held_out and name in ("pairs", "logps"):
            return "complete"  # optional stages
        if name in ("responses", GIVEN, "rewards"):
            return f"{name}: {len(stored.shards(name))} of {shards} shards"
        return f"{name} missing"
    return "complete"


def make_evaluations_table(store: RoundStore) -> Table:
    """A table with a line per evaluation on the held-out prompts."""
    table = Table(title="Held-out prompts", title_justify="left")
    columns = ("after round", "prompts", "responses", "scored", "reward", "std", "tokens", "finished", "KL(new||old)",
               "state")  # fmt: skip
    for name in columns:
        table.add_column(name, justify="left" if name == "state" else "right")
    for version, stored in store.evaluations().items():
        try:
            manifest = stored.manifest
        except InputError:
            table.add_row(str(version), *["-"] * (len(columns) - 2), "manifest damaged")
            continue
        responses, rewards = (manifest["stages"].get(name, {}) for name in ("responses", "rewards"))
        finished = responses.get("finished_share")
        table.add_row(
            str(version),
            _text(manifest.get("prompts", {}).get("in_round")),
            _text(responses.get("responses")),
            _text(rewards.get("scored")),
            _text(rewards.get("mean"), 3),
            _text(rewards.get("std"), 3),
            _text(responses.get("tokens_mean"), 0),
            "-" if finished is None else f"{finished:.0%}",
            _text(manifest["stages"].get("kl", {}).get("new_old"), 2),
            describe_state(stored),
        )
    return table


def make_details(stored: Round) -> Group:
    """A round's stages with their counts and times, its settings and its warnings."""
    manifest = stored.manifest
    table = Table(title=f"Round {int(stored.path.name) + 1} ({stored.path})", title_justify="left")
    for name in ("stage", "state", "shards", "size", "seconds", "counts"):
        table.add_column(name)
    for name in ORDER:
        info = manifest["stages"].get(name, {})
        if name == GIVEN and not info:
            continue
        files = list(stored.shards(name).values()) if name in STAGES else []
        numbers = {k: v for k, v in info.items() if k not in ("complete", "seconds", "shards", "sampling")}
        table.add_row(
            name,
            "complete" if info.get("complete") else f"{len(files)} shards so far" if files else "missing",
            str(len(files)) if files else "-",
            format_bytes(sum(file.stat().st_size for file in files)) if files else "-",
            _text(info.get("seconds"), 1),
            "\n".join(f"{key}: {_short(value)}" for key, value in without_bins(numbers).items()),
        )
    record = {name: value for name, value in manifest.get("rounds_from", {}).items() if name != "files"}
    settings = [f"rounds_from.{name}: {value}" for name, value in record.items()]
    settings += [
        f"{stage}.{name}: {_short(value)}"
        for stage, values in manifest.get("settings", {}).items()
        for name, value in values.items()
    ]
    prompts = [f"{name}: {count}" for name, count in manifest.get("prompts", {}).items()]
    settings += [f"chosen by the loss: {_short(choice)}" for choice in manifest.get(ENTRY, {}).get("terms", [])]
    warnings = [f"warning: {text}" for text in manifest.get("warnings", {}).values()]
    return Group(
        table,
        Panel(Text("\n".join(prompts)), title="prompts", title_align="left"),
        Panel(Text("\n".join(settings)), title="settings", title_align="left"),
        *(Text(line, style="yellow") for line in warnings),
    )


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(inner)}" for key, inner in value.items()) or "none"
    return str(value)


def make_sample_panels(stored: Round, count: int) -> list[Panel]:
    """Panels of the first `count` prompts with their responses, best first, and the rewards stored so far."""
    rewards: dict[tuple[str, int], tuple[float | None, str | None]] = {}
    groups: dict[str, list[dict[str, Any]]] = {}
    scored = stored.shards("rewards")
    for number in stored.shards("responses") if count else ():
        table = stored.read_shard("responses", number, _SHOWN_COLUMNS)
        wanted = pc.unique(table["prompt_id"])[: count - len(groups)]
        for row in _select_rows(table, wanted):
            groups.setdefault(row["prompt_id"], []).append(row)
        if number in scored:
            for row in _select_rows(stored.read_shard("rewards", number), wanted):
                rewards[row["prompt_id"], row["response_index"]] = row["reward"], row["failure"]
        if len(groups) == count:
            break
    panels = []
    for prompt_id, responses in groups.items():
        table = Table(box=None, show_header=False, padding=(0, 1))
        keyed = [(rewards.get((prompt_id, row["response_index"]), (None, None)), row) for row in responses]
        for (reward, failure), row in sorted(keyed, key=lambda item: -(item[0][0] or 0.0)):
            note = "" if row["finished"] else " (truncated)"
            table.add_row(
                format_reward(reward),
                Text(row["response"].strip() + note + (f"\n[{failure}]" if failure else "")),
            )
        question = message_text(json.loads(responses[0]["prompt"])[-1])
        panels.append(Panel(Group(Text(question, style="bold"), table), title=Text(prompt_id), title_align="left"))
    return panels


_SHOWN_COLUMNS = ("prompt_id", "response_index", "prompt", "response", "finished")


def _select_rows(table: pa.Table, prompt_ids: pa.Array) -> list[dict[str, Any]]:
    return table.filter(pc.is_in(table["prompt_id"], prompt_ids)).to_pylist()
