"""Shows responses to the same held-out prompts round after round, in the loggers and as a page."""

import html
import os
from pathlib import Path

import lightning as L

from rlhf_pl.checkpointing.progress import has_stopped_inside, rounds_done
from rlhf_pl.rounds.metrics import first_responses, format_reward, prompt_ids
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.secrets import redact

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em;max-width:1400px}table{border-collapse:collapse;width:100%}"
    "td,th{border:1px solid #ccc;padding:.5em;vertical-align:top;text-align:left;white-space:pre-wrap}"
    "th{background:#f4f4f4}b{color:#06c}"
)


class SampleTable(L.Callback):
    """Logs a table of held-out prompts with a response from every round, and writes it as `samples.html`.

    Args:
        num_prompts: Prompts in the table; 0 for no table.
    """

    def __init__(self, num_prompts: int = 16) -> None:
        if num_prompts < 0:
            raise InputError(f"`samples.num_prompts` must be 0 or more, got {num_prompts}.")
        self.num_prompts = num_prompts

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if has_stopped_inside(trainer):
            return
        store = RoundStore(trainer.default_root_dir)
        version = rounds_done(trainer)
        if self.num_prompts == 0 or not trainer.is_global_zero or not store.held_out(version).is_complete("rewards"):
            return
        header, rows = sample_rows(store, version, self.num_prompts)
        step = max(0, trainer.global_step - 1)  # of the last update: a resumed run hides later steps
        for logger in trainer.loggers:
            add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
            if add_text is not None:
                add_text("samples", to_markdown(header, rows), step)
            elif hasattr(logger, "log_table"):
                logger.log_table("samples", columns=header, data=rows, step=step)
        page = Path(trainer.default_root_dir) / "samples.html"
        temporary = page.with_suffix(".tmp")
        temporary.write_text(to_html(header, rows), encoding="utf-8")
        os.replace(temporary, page)


def sample_rows(store: RoundStore, version: int, count: int) -> tuple[list[str], list[list[str]]]:
    """A header, and for each prompt its text and the first response of every version up to `version`."""
    versions = {"before" if v == 0 else f"after round {v}": store.held_out(v) for v in range(version + 1)}
    scored = {name: stored for name, stored in versions.items() if stored.is_complete("rewards")}
    shown = list(dict.fromkeys(prompt_id for stored in scored.values() for prompt_id in prompt_ids(stored)))[:count]
    prompts: dict[str, str] = {}
    cells: dict[str, list[str]] = {prompt_id: [] for prompt_id in shown}
    for stored in scored.values():
        rows = first_responses(stored, shown)
        for prompt_id in shown:
            row = rows.get(prompt_id)
            if row is None:  # an evaluation of other prompts
                cells[prompt_id].append("-")
                continue
            prompts[prompt_id] = row["question"]
            cells[prompt_id].append(f"{row['response'].strip()}\n[reward {format_reward(row['reward'])}]")
    return ["prompt", *scored], [[prompts[prompt_id], *cells[prompt_id]] for prompt_id in shown]


def to_markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; line breaks become `<br>`. HTML, links and images in a text are shown as plain text."""
    lines = [list(map(_as_markdown, header)), ["---"] * len(header), *(list(map(_as_markdown, row)) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _as_markdown(text: str) -> str:
    text = html.escape(redact(text), quote=False).replace("\n", "<br>")
    return text.replace("|", "&#124;").replace("[", "&#91;").replace("]", "&#93;")


def to_html(header: list[str], rows: list[list[str]]) -> str:
    """A self-contained HTML page."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(redact(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<!doctype html><meta charset="utf-8"><title>Samples</title><style>{_STYLE}</style>'
        f"<h1>Held-out prompts</h1><table><tr>{head}</tr>{body}</table>\n"
    )
