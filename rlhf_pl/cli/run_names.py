"""Run directories of configs that name none, and the line that says whether a run is new or goes on."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from rlhf_pl.checkpointing.checkpoints import find_resume_files
from rlhf_pl.store.run_identity import ROUNDS
from rlhf_pl.utils.kept_files import describe_parts

_MODELS = ("policy", "backbone")
_SOURCES = ("prompts", "conversations", "preferences", "pairs")
_MAX_LENGTH = 40  # characters of a part of the name


def name_run(config: Namespace) -> str:
    """Directory of an experiment, such as `runs/SmolLM2-135M-score-1f09ab`, from the config's text alone.

    It tells experiments apart by module, model, LoRA or not, loss, data, reward and `--rounds_from`. Whatever else
    changes (rates, sampling, seed, number of rounds) is a change within one run.

    Args:
        config: The config of `rlhf-pl fit`, before its classes are built.
    """
    model, data = (_plain(config.get(group)) for group in ("model", "data"))
    reward = _plain(config.get("rollout.reward"))
    options, rows = (_options(group) for group in (model, data))
    policy = next((options[name] for name in _MODELS if options.get(name)), None)
    source = next((rows[name] for name in _SOURCES if rows.get(name)), None)
    identity = [
        _class_name(model),
        policy,
        options.get("lora") is not None,
        _class_name(options.get("loss")),
        _class_name(data),
        source if source is not None else rows,
        rows.get("split"),
        reward,
        config.get("rounds_from"),
    ]
    text = json.dumps(identity, sort_keys=True, default=str)
    parts = [_slug(policy or _class_name(model)), _slug(_reward_name(reward) or source or _class_name(data))]
    return f"runs/{'-'.join(filter(None, parts))}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def describe_run(run_dir: str, epochs: int | None, unit: str) -> str:
    """A line that says whether the run is new or goes on, how far it is, and what it holds.

    Args:
        run_dir: The run directory.
        epochs: Number of rounds or epochs of the run; None or -1 for no limit.
        unit: `round` or `epoch`.
    """
    files = find_resume_files(run_dir)
    if not files and not (Path(run_dir) / ROUNDS).exists():
        return f"Run directory {run_dir}: new."
    done = list(files.values())[-1].rounds_done if files else 0
    of = f"{done} of {epochs}" if epochs not in (None, -1) else str(done)
    plural = "" if (done if epochs in (None, -1) else epochs) == 1 else "s"
    kept = describe_parts(run_dir) or "no data"
    return f"Goes on with {run_dir}: {of} {unit}{plural} trained; it holds {kept}."


def _plain(value: Any) -> Any:
    """A config's value without Namespaces."""
    return value.as_dict() if isinstance(value, Namespace) else value


def _options(described: Any) -> dict[str, Any]:
    return (described.get("init_args") or {}) if isinstance(described, dict) else {}


def _class_name(described: Any) -> str:
    path = described.get("class_path") if isinstance(described, dict) else described
    return "" if path is None else str(path).rsplit(".", 1)[-1]


def _reward_name(reward: Any) -> str:
    """Name of a reward's function or model, or of its class."""
    if isinstance(reward, dict):
        model = _options(reward).get("model")
        return model if isinstance(model, str) else _class_name(reward)
    return "" if reward is None else re.split(r"[.:]", str(reward))[-1]


def _slug(text: Any) -> str:
    """The last part of a path or name, without its extension for data, in characters that suit a folder's name."""
    name = re.sub(r"\.(jsonl?|parquet|csv|tsv|txt)$", "", str(text).rstrip("/").rsplit("/", 1)[-1])
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:_MAX_LENGTH]
