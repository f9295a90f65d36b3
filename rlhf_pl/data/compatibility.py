"""Checks that a DataModule fits its module and its checkpoint."""

from typing import Any

from rlhf_pl.data.group_batches import GroupBatch
from rlhf_pl.data.policy_module import find_missing_members
from rlhf_pl.utils.errors import InputError


def check_same_rows(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError if a checkpoint was trained on other rows."""
    if before != now:
        raise InputError(
            "This run directory was trained on other data than that of the config. Use another run directory "
            "(--trainer.default_root_dir DIR), or remove this one to train from the start."
        )


def check_module(module: Any, data: Any, batch_type: type) -> None:
    """Raise InputError unless the module's `batch_type` is that of the DataModule; its class does not matter."""
    accepted = getattr(module, "batch_type", None)
    if not (isinstance(accepted, type) and issubclass(accepted, batch_type)):
        takes = f"trains on {accepted.__name__}" if isinstance(accepted, type) else "does not define `batch_type`"
        raise InputError(
            f"`data`: {type(data).__name__} provides {batch_type.__name__}, and `model` {type(module).__name__} "
            f"{takes}. Combine RebelModule with RoundDataModule or OfflineDataModule, RewardModelModule with "
            "PreferenceDataModule, SFTModule with SFTDataModule."
        )


def check_policy_module(module: Any, data: Any) -> None:
    """Raise InputError unless the module of a DataModule of rounds or pairs is a `PolicyModule`."""
    check_module(module, data, GroupBatch)
    if missing := find_missing_members(module):
        raise InputError(
            f"`model`: {type(module).__name__} lacks {', '.join(missing)}, which {type(data).__name__} requires: see "
            "rlhf_pl.PolicyModule."
        )
