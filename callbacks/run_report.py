"""A run's report at the terminal: a line a round; at the end a table, responses before and after, and next steps."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from rich import box
from rich.console import Group
from rich.panel import Panel
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from rlhf_pl.algorithms.margin_metrics import margin_metric_names
from rlhf_pl.algorithms.policy_loss import PolicyLoss
from rlhf_pl.callbacks.degeneration_guard import DegenerationGuard
from rlhf_pl.callbacks.next_steps import next_steps
from rlhf_pl.callbacks.round_refresh import RoundRefresh
from rlhf_pl.checkpointing.progress import has_stopped_inside, rounds_done
from rlhf_pl.data.policy_module import PolicyModule, is_policy_module
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.data.run_limits import had_reached_max_steps
from rlhf_pl.rounds.metrics import (
    KL_NOTE,
    choices,
    describe_margins,
    policy_kl,
    training_margins,
)
from rlhf_pl.rounds.report.gain import describe_gain, read_gain
from rlhf_pl.rounds.report.legend import make_legend
from rlhf_pl.rounds.report.movement import describe_standstill, moved_in_all
from rlhf_pl.rounds.report.numbers import decimals_for
from rlhf_pl.rounds.report.shown import prompts_of_median_gain, typical_pairs
from rlhf_pl.rounds.report.sparse import describe_sparsity
from rlhf_pl.rounds.report.unfinished import describe_unfinished
from rlhf_pl.store.round_store import DamagedStoreError, RoundStore
from rlhf_pl.utils.console import console, note, warn


class RunReport(L.Callback):
    """Prints the course of a run. Reads the round store and writes nothing.

    Args:
        num_samples: Held-out prompts to show with their responses before and after.
    """

    def __init__(self, num_samples: int = 3) -> None:
        self.num_samples = num_samples
        self._advised: set[str] = set()  # what was noted about rounds, each cause once
        self._reported: set[int] = set()  # numbers of rounds that an earlier process has finished and reported
        self._was_at_max_steps = False  # where an earlier process had ended the run

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if not trainer.is_global_zero or not isinstance(data, RoundDataModule):
            return
        if trainer.ckpt_path is not None:
            self._reported = _finished_rounds(RoundStore(trainer.default_root_dir), bool(data.val_prompts))
        self._was_at_max_steps = had_reached_max_steps(trainer)
        if trainer.max_epochs in self._reported or self._was_at_max_steps:
            return
        per_round = len(data.round_prompts(0))
        console.print(
            f"Prompts: {len(data.train_prompts)} for training, {per_round} a round; {len(data.val_prompts)} held out"
            + (f"; {data.prompts_too_long} left out, longer than {data.max_prompt_tokens} tokens"
               if data.prompts_too_long else "")
            + f". Run directory: {trainer.default_root_dir}",
            soft_wrap=True,
        )  # fmt: skip
        if data.duplicate_prompts:
            warn(f"Prompts that ask the same as another: {data.duplicate_prompts}; they are kept.")
        if is_policy_module(pl_module) and (legend := _legend(trainer, pl_module, data)):
            console.print(legend, soft_wrap=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and not has_stopped_inside(trainer):
            done = rounds_done(trainer)
            self._reported.discard(done)
            store = RoundStore(trainer.default_root_dir)
            loss: PolicyLoss = pl_module.loss  # type: ignore[assignment]
            console.print(round_line(store, done - 1, loss), soft_wrap=True)
            causes = describe_sparsity(store.round(done - 1)) | {"unfinished": describe_unfinished(store, done)}
            for cause, text in causes.items():
                if text and cause not in self._advised:
                    note(f"round {done}: {text}.")
                    self._advised.add(cause)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        store = RoundStore(trainer.default_root_dir)
        rounds = rounds_done(trainer)
        if rounds == 0:
            return
        was_finished = rounds in self._reported
        console.print()
        if was_finished and self._was_at_max_steps:
            console.print("This run had ended at `trainer.max_steps`, and nothing is left to do.", soft_wrap=True)
        elif was_finished:
            trained = "its round was" if rounds == 1 else f"its {rounds} rounds were"
            console.print(f"This run is finished: {trained} trained before, and nothing is left to do.", soft_wrap=True)
        else:
            print_uncropped(rounds_table(store, rounds))
        if all(store.held_out(version).is_complete("rewards") for version in (0, rounds)):
            if not was_finished:
                console.print(before_after(store, rounds, self.num_samples))
            console.print(describe_gain(read_gain(store, rounds), moved_in_all(store, rounds)), soft_wrap=True)
        if steps := next_steps(trainer, self, rounds if was_finished else None):
            console.print(steps, soft_wrap=True)


def _finished_rounds(store: RoundStore, evaluates: bool) -> set[int]:
    """Numbers, counted from 1, of the rounds that are trained and, if the run evaluates, evaluated.

    None of a damaged store, which `RoundRefresh` refuses or repairs.
    """
    try:
        return _read_finished_rounds(store, evaluates)
    except DamagedStoreError:
        return set()


def _read_finished_rounds(store: RoundStore, evaluates: bool) -> set[int]:
    done = {index + 1 for index, stored in store.rounds().items() if stored.is_complete("training")}
    return {number for number in done if not evaluates or store.held_out(number).is_complete("rewards")}


def _legend(trainer: L.Trainer, module: PolicyModule, data: RoundDataModule) -> str:
    """What the numbers of this run's rounds mean."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    guard = next((callback for callback in callbacks if isinstance(callback, DegenerationGuard)), None)
    rounds = next((callback for callback in callbacks if isinstance(callback, RoundRefresh)), None)
    options = None if rounds is None else rounds.options
    samples = options is not None and options.val_sampling.temperature > 0 and bool(data.val_prompts)
    max_kl = None if guard is None else guard.max_kl
    margins = margin_metric_names(module.loss, module.needs)
    return make_legend(module.loss, "old_logps" in module.needs, samples, max_kl, margins)


def print_uncropped(table: Table) -> None:
    """Print a table at its full width: cropped cells could not be read, least of all in a file."""
    options = console.options.update_width(200)
    needed = max(console.width, console.measure(table, options=options).maximum)
    for line in console.render_lines(table, options.update_width(needed), pad=False):
        console.print(Segments([*line, Segment.line()]), crop=False, soft_wrap=True)


def round_line(store: RoundStore, index: int, loss: PolicyLoss) -> str:
    """One line about a finished round, and the loss that it trained with."""
    stages = store.round(index).manifest["stages"]
    responses, rewards, training = stages["responses"], stages["rewards"], stages["training"]
    count = responses["sampling"]["num_responses"]
    spread = "" if count == 1 else f" (best {rewards['best']:.3f}, worst {rewards['worst']:.3f} of {count})"
    kl = "" if training["kl"] is None else f"KL(old||new) {training['kl']:z.2f} (k1), "
    parts = [
        f"round {index + 1}: reward {rewards['mean']:.3f}{spread}",
        f"{responses['tokens_mean']:.0f} tokens, {responses['finished_share']:.0%} finished",
        f"{kl}loss {_number(training['loss'], 3)}",
        f"seconds: generate {responses['seconds']:.0f}, score {rewards['seconds']:.0f}, "
        f"log-probs {stages['logps']['seconds']:.0f}, train {training['seconds']:.0f}",
    ]
    if equal := stages["pairs"].get("equal_rewards"):
        parts.insert(1, f"all rewards equal for {equal} of {stages['pairs']['groups']} prompts")
    if margins := describe_margins(store.round(index).manifest):
        parts.insert(3, margins)
    if refilled := responses.get("refilled"):
        parts.insert(1, f"prompts refilled: {refilled}")
    if store.held_out(index + 1).is_complete("rewards"):
        after = store.held_out(index + 1)
        new = policy_kl(after)
        kl_text = f", KL(new||old) {new['new_old']:z.2f} ± {new['new_old_se']:.2f} (k1)" if "new_old" in new else ""
        parts.insert(1, f"held-out reward {_course(store, index)}{kl_text}")
    if standstill := describe_standstill(store, index, loss):
        parts.append(standstill)
    return " | ".join(parts)


def _course(store: RoundStore, index: int) -> str:
    """The held-out reward before and after a round, and at the start, as far as they are known."""
    versions = [store.held_out(version) for version in (0, index, index + 1)]
    start, before, after = (v.info("rewards") if v.is_complete("rewards") else None for v in versions)
    assert after is not None
    means = [stage["mean"] for stage in (start, before, after) if stage is not None]
    differences = [abs(mean - means[0]) for mean in means[1:] if mean != means[0]]
    digits = decimals_for(min(differences, default=0.0))
    text = f"{after['mean']:.{digits}f}"
    text = f"now {text}" if before is None else f"{before['mean']:.{digits}f} → {text}"
    return text + (f" ({start['mean']:.{digits}f} at the start)" if index > 0 and start is not None else "")


def rounds_table(store: RoundStore, rounds: int) -> Table:
    """Table with a line for each round."""
    held_out = store.held_out(0).is_complete("rewards")
    title = "Rounds" + (" (before, after: mean reward on the held-out prompts)" if held_out else "")
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False, "pad_edge": False}
    table = Table(title=title, title_justify="left", caption=KL_NOTE, caption_justify="left", **style)
    manifests = [store.round(index).manifest for index in range(rounds)]
    compares = any(_num_responses(manifest) > 1 for manifest in manifests)
    has_pairs = any(manifest["stages"].get("pairs", {}).get("selector") is not None for manifest in manifests)
    headers = ["round", "reward", *(["best", "worst"] if compares else []), "tokens", "finished"]
    headers += ["pairs" if has_pairs else "prompts", "KL\nold||new", "loss", "time"]
    further = list(dict.fromkeys(name for manifest in manifests for name in choices(manifest)))  # eta
    has_reached = any("reached" in training_margins(manifest) for manifest in manifests)
    headers += [*further, *(["targets\nreached"] if has_reached else [])]
    for header in headers + (["before", "after", "KL\nnew||old"] if held_out else []):
        table.add_column(header, justify="right", no_wrap=True)
    for index in range(rounds):
        stages = manifests[index]["stages"]
        if not stages.get("rewards", {}).get("complete"):  # the round is lost, and not needed any more
            continue
        responses, rewards, training = stages["responses"], stages["rewards"], stages.get("training", {})
        seconds = sum(stage.get("seconds", 0.0) for stage in stages.values())
        cells = [
            str(index + 1),
            f"{rewards['mean']:.3f}",
            *([f"{rewards['best']:.3f}", f"{rewards['worst']:.3f}"] if compares else []),
            f"{responses['tokens_mean']:.0f}",
            f"{responses['finished_share']:.0%}",
            str(stages.get("pairs", {}).get("pairs", "-")),
            _number(training.get("kl"), 2),
            _number(training.get("loss"), 3),
            f"{seconds:.0f} s",
        ]
        cells += [_number(choices(manifests[index]).get(name), 3) for name in further]
        if has_reached:
            cells.append(_number(training_margins(manifests[index]).get("reached"), 0, "%"))
        if held_out:
            cells += [_held_out_mean(store, version) for version in (index, index + 1)]
            cells.append(_number(policy_kl(store.held_out(index + 1)).get("new_old"), 2))
        table.add_row(*cells)
    return table


def _num_responses(manifest: Mapping[str, Any]) -> int:
    """Responses to each prompt of a round; 0 if the round is lost."""
    return int(manifest["stages"].get("responses", {}).get("sampling", {}).get("num_responses", 0))


def _number(value: float | None, digits: int, kind: str = "f") -> str:
    """A number as text; a dash for None, of a round without updates."""
    return "-" if value is None else f"{value:z.{digits}{kind}}"


def _held_out_mean(store: RoundStore, version: int) -> str:
    stored = store.held_out(version)
    return f"{stored.info('rewards')['mean']:.3f}" if stored.is_complete("rewards") else "-"


def before_after(store: RoundStore, version: int, count: int) -> Group:
    """Prompts of median gain with a response of the starting and of the current policy, side by side."""
    shown = prompts_of_median_gain(store, version, count)
    before, after = typical_pairs(store.held_out(0), store.held_out(version), shown)
    panels: list[Any] = []
    if shown:
        panels.append(Text("Held-out prompts of median gain" if len(shown) == count else "Held-out prompts"))
    for prompt_id in shown:
        old, new = before[prompt_id], after[prompt_id]
        digits = decimals_for(abs(new["mean"] - old["mean"]))
        table = Table(show_edge=False, pad_edge=False, expand=True)
        for name, row in (("before", old), ("after", new)):
            mean = f" (mean of {row['count']}: {row['mean']:.{digits}f})" if row["count"] > 1 else ""
            table.add_column(f"{name}: reward {row['reward']:.{digits}f}{mean}", ratio=1)
        table.add_row(Text(old["response"].strip()), Text(new["response"].strip()))
        prompt = old["question"]
        panels.append(Panel(table, title=Text(prompt if len(prompt) < 90 else prompt[:89] + "…"), title_align="left"))
    return Group(*panels)
