"""Methods that users' subclasses still define under an earlier name."""

from collections.abc import Mapping

from rlhf_pl.utils.console import note


def map_renamed_methods(cls: type, renamed: Mapping[str, str]) -> None:
    """Make a subclass's methods with earlier names override the renamed methods, with a note that gives the new names.

    Args:
        cls: A new subclass.
        renamed: New names of methods by their earlier names.
    """
    mapped = {}
    for earlier, new in renamed.items():
        for base in cls.__mro__:
            if new in vars(base):  # overridden under its new name, or mapped in a base class already
                break
            if callable(method := vars(base).get(earlier)):
                setattr(cls, new, method)
                mapped[earlier] = new
                break
    if mapped and _is_rank_zero():
        names = ", ".join(f"`{earlier}` is now `{new}`" for earlier, new in mapped.items())
        note(f"{cls.__module__}.{cls.__qualname__}: {names}. Rename it; until then it is called as before.")


def _is_rank_zero() -> bool:
    from lightning.pytorch.utilities import rank_zero_only

    return rank_zero_only.rank == 0  # type: ignore[attr-defined]
