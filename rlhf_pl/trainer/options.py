"""Options of the Trainer: the defaults of a run, and how their values are read."""

from typing import Any

DEFAULTS: dict[str, Any] = {
    "max_epochs": 3,
    "precision": "bf16-mixed",
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "reload_dataloaders_every_n_epochs": 1,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}


def listed(given: Any) -> list[Any]:
    """The values of an option that takes one value, several or null, as a list."""
    return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]


def has_kind(parts: list[Any], kind: type) -> bool:
    """Whether one of an option's values is of a kind."""
    return any(isinstance(part, kind) for part in parts)
