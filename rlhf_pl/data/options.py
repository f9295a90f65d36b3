"""Checks of the DataModules' options and states."""

from typing import Any

from rlhf_pl.data.pair_batches import GroupBatch
from rlhf_pl.data.policy_module import lacking
from rlhf_pl.utils.errors import InputError


def refuse_other_rows(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError if a checkpoint was trained on other rows."""
    if before != now:
        raise InputError(
            "This run directory was trained on other data than the config now gives. Give this run a directory of its "
            "own (--trainer.default_root_dir DIR), or remove the old one to train anew."
        )


def check_module(module: Any, data: Any, batch_type: type) -> None:
    """Raise InputError if a DataModule is asked to feed a module that trains on other batches than it serves.

    What counts is the module's `batch_type`, not its class.
    """
    given = getattr(module, "batch_type", None)
    if not (isinstance(given, type) and issubclass(given, batch_type)):
        takes = f"trains on {given.__name__}" if isinstance(given, type) else "does not say its `batch_type`"
        raise InputError(
            f"`data`: {type(data).__name__} serves {batch_type.__name__}, and `model` {type(module).__name__} {takes}. "
            "Choose a pair that fits: RebelModule with RoundDataModule or OfflineDataModule, RewardModelModule with "
            "PreferenceDataModule, SFTModule with SFTDataModule."
        )


def check_policy_module(module: Any, data: Any) -> None:
    """Raise InputError if a DataModule of rounds or pairs is asked to feed a module that is not a `PolicyModule`."""
    check_module(module, data, GroupBatch)
    if missing := lacking(module):
        raise InputError(
            f"`model`: {type(module).__name__} lacks {', '.join(missing)}, which {type(data).__name__} needs of a "
            "module: see rlhf_pl.PolicyModule."
        )
