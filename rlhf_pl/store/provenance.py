"""What every stage of a round was made from, and what becomes of a stored round when that has changed."""

from collections.abc import Mapping
from typing import Any

from rlhf_pl.store.round_store import ORDER, Round
from rlhf_pl.utils.console import console
from rlhf_pl.utils.errors import InputError

StageSettings = dict[str, dict[str, Any]]
# These two follow from the training before and say which policy answered; the others are choices of the user.
OF_POLICY = ("policy_step", "weights")
# how the report of a changed stage ends: "... is scored again"
REDONE = {
    "responses": "generated",
    "rewards": "scored",
    "pairs": "paired",
    "logps": "passed through the policy",
    "training": "trained on",
}


class ChangedSettingsError(InputError):
    """A run directory was made with other upstream settings."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *ignore: str) -> list[str]:
    """`name: before -> now` for each setting that differs; settings of nested groups by their full names."""
    lines = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if name in ignore or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            lines += [f"{name}.{line}" for line in differences(old, new)]
        else:
            lines.append(f"{name}: {_short(old)} -> {_short(new)}")
    return lines


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:119] + "…"


def first_change(before: StageSettings, now: StageSettings, stages: tuple[str, ...] = ORDER) -> str | None:
    """The first of `stages` whose settings differ, other than in which policy answered."""
    for stage in stages:
        if stage in before and stage in now and differences(before[stage], now[stage], *OF_POLICY):
            return stage
    return None


def refuse_upstream_change(stored: Round, now: StageSettings) -> None:
    """Raise unless the round was generated with the present settings.

    Raises:
        ChangedSettingsError: Lists the differences and the choices.
    """
    manifest = stored.manifest
    before = manifest.get("settings", {}).get("responses")
    if before is None or manifest.get("accepted") == _choices(now):
        return
    if changed := differences(before, now["responses"], *OF_POLICY):
        raise ChangedSettingsError(
            f"{stored.path} was made with other settings:\n"
            + "\n".join(f"  {line}" for line in changed)
            + "\nEither give this run a directory of its own (--trainer.default_root_dir DIR), or give "
            "--accept_changes to go on here: what is finished stays as it is, and the new settings count from here on."
        )


def _choices(settings: StageSettings) -> dict[str, Any]:
    return {k: v for k, v in settings["responses"].items() if k not in OF_POLICY}


def reconcile_round(stored: Round, now: StageSettings, accept: bool, fresh: Mapping[str, Any]) -> None:
    """Stamp a round that is about to be made, or keep of a stored one what is still valid.

    A changed reward, selector or training setting invalidates its own stage and those after it. Answers of another
    policy than the present one are useless, unless they were trained on, which only happens when somebody resumes
    from an older checkpoint on purpose.

    Args:
        stored: The round.
        now: The present settings.
        accept: Whether changed upstream settings are accepted.
        fresh: Further entries of a new manifest.

    Raises:
        ChangedSettingsError: Upstream settings differ and `accept` is False.
    """
    now = Round.as_stored(now)
    before = stored.manifest.get("settings")
    if before is None:
        stored.update(settings=now, **fresh)
        return
    moved = any(before["responses"][k] != now["responses"][k] for k in OF_POLICY)
    if not accept:
        refuse_upstream_change(stored, now)
    elif differences(before["responses"], now["responses"], *OF_POLICY):
        if stored.is_complete("responses") and not moved:
            stored.update(accepted=_choices(now))
        else:
            _begin_anew(stored, now, fresh, "its settings have changed")
            return
    if moved:
        if stored.is_complete("training") and not accept:
            raise ChangedSettingsError(
                f"{stored.path} was generated and trained on by another policy than this checkpoint's. Give this run "
                "a directory of its own (--trainer.default_root_dir DIR), resume from the newest checkpoint (no "
                "--ckpt_path), or give --accept_changes to make this round and those after it anew."
            )
        _begin_anew(stored, now, fresh, "the policy is another one")
        return
    changed = first_change(before, now, ORDER[1:])
    if changed is not None:
        lines = differences(before[changed], now[changed])
        if any(name in stored.manifest["stages"] or stored.shards(name) for name in ORDER[ORDER.index(changed) :]):
            console.print(f"{stored.name} is {REDONE[changed]} again: {'; '.join(lines)}", soft_wrap=True)
        stored.clear(changed)
    if before != now:
        stored.update(settings={**now, "responses": before["responses"]} if "accepted" in stored.manifest else now)


def _begin_anew(stored: Round, now: StageSettings, fresh: Mapping[str, Any], why: str) -> None:
    if stored.manifest["stages"] or stored.shards("responses"):
        console.print(f"{stored.name} is made anew: {why}.", soft_wrap=True)
    stored.delete()
    stored.update(settings=now, **fresh)
