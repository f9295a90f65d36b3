"""Compares the settings of a stored round with the current ones, and clears the stages that they invalidate."""

import re
from collections.abc import Mapping
from typing import Any

from rlhf_pl.store.round_store import ORDER, Round
from rlhf_pl.utils.console import console
from rlhf_pl.utils.errors import InputError

StageSettings = dict[str, dict[str, Any]]
# These two identify the policy that sampled the responses. The other settings are set by the user.
POLICY_KEYS = ("policy_step", "weights")
# These say that responses came with something more, which does no harm where it is not needed.
EXTRAS = ("sampler_token_logps",)
# for reports about a changed stage: "... is scored again"
REDONE = {
    "responses": "generated",
    "rewards": "scored",
    "pairs": "paired",
    "logps": "passed through the policy",
    "training": "trained on",
}


_HASH = re.compile(r":?\b(?=[0-9a-f]*[0-9])[0-9a-f]{16,64}\b")
# what the settings are that manifests store as hashes alone
_HASHED = {
    "prompts": "the prompts have changed: their ids, texts, number or order, or the chat template that renders them",
    "columns": "the prompts' further columns, which the reward sees, have changed",
    "messages": "keys of the prompts' messages, which the reward sees, have changed",
    "weights": "the policy's weights have changed",
}


class ChangedSettingsError(InputError):
    """A run directory was made with other settings of an earlier stage."""


def list_differences(before: Mapping[str, Any], now: Mapping[str, Any], *ignore: str) -> list[str]:
    """A line `name: before -> now` for each setting that differs; nested settings have dotted names.

    A hash is not shown: a line says in words what has changed.
    """
    lines = []
    for name in dict.fromkeys([*before, *now]):
        previous, current = before.get(name), now.get(name)
        if name in ignore or previous == current:
            continue
        if isinstance(previous, dict) and isinstance(current, dict):
            lines += [f"{name}.{line}" for line in list_differences(previous, current)]
        else:
            lines.append(f"{name}: {_describe_change(name, previous, current)}")
    return lines


def _describe_change(name: str, previous: Any, current: Any) -> str:
    """Old and new value without hashes, which tell a reader nothing; words where nothing else differs."""
    before, now = (_HASH.sub("", value) if isinstance(value, str) else str(value) for value in (previous, current))
    if name in _HASHED and not (before.strip() and now.strip()):
        return _HASHED[name]
    if before == now:
        return f"the content of {_shorten(now)} has changed (code, weights or data)"
    return f"{_shorten(before)} -> {_shorten(now)}"


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:119] + "…"


def keep_extras(before: StageSettings, now: StageSettings) -> StageSettings:
    """The settings `now`, with those of `EXTRAS` that the responses were made with `before`."""
    extras = {name: before["responses"][name] for name in EXTRAS if name in before["responses"]}
    return {**now, "responses": now["responses"] | extras}


def find_first_change(before: StageSettings, now: StageSettings, stages: tuple[str, ...] = ORDER) -> str | None:
    """The first stage whose settings differ, apart from the identity of the policy; None if none does."""
    for stage in stages:
        if stage in before and stage in now and list_differences(before[stage], now[stage], *POLICY_KEYS):
            return stage
    return None


def refuse_upstream_change(stored: Round, now: StageSettings) -> None:
    """Raise if the settings of the stage `responses` have changed.

    Raises:
        ChangedSettingsError: Lists the differences and the remedies.
    """
    manifest = stored.manifest
    before = manifest.get("settings", {}).get("responses")
    if before is None:
        return
    now = keep_extras(manifest["settings"], now)
    if manifest.get("accepted") == _user_settings(now):
        return
    if changed := list_differences(before, now["responses"], *POLICY_KEYS):
        if stored.is_held_out:  # these have an option of their own
            changed = [re.sub(r"^sampling\.num_responses", "rollout.val_num_responses", line) for line in changed]
        raise ChangedSettingsError(
            f"{stored.path} was made with other settings:\n"
            + "\n".join(f"  {line}" for line in changed)
            + "\nUse another run directory (--trainer.default_root_dir DIR), or add --accept_changes to continue in "
            "this one: what is complete is kept, and everything later uses the new settings."
        )


def _user_settings(settings: StageSettings) -> dict[str, Any]:
    return {k: v for k, v in settings["responses"].items() if k not in POLICY_KEYS}


def reconcile_round(stored: Round, now: StageSettings, accept: bool, fresh: Mapping[str, Any]) -> None:
    """Write the settings of a new round, or clear the invalid stages of a stored one.

    A changed reward, selector or training setting invalidates its own stage and those after it. Responses of another
    policy than the current one invalidate the round. If it was already trained on, the user has resumed from an older
    checkpoint, and must accept the change.

    Args:
        stored: The round.
        now: The current settings.
        accept: Whether changed settings of the responses are accepted.
        fresh: Further entries of a new manifest.

    Raises:
        ChangedSettingsError: Settings of the responses differ and `accept` is False.
    """
    now = Round.as_stored(now)
    before = stored.manifest.get("settings")
    if before is None:
        stored.update(settings=now, **fresh)
        return
    now = keep_extras(before, now)
    is_other_policy = any(before["responses"][k] != now["responses"][k] for k in POLICY_KEYS)
    if not accept:
        refuse_upstream_change(stored, now)
    elif list_differences(before["responses"], now["responses"], *POLICY_KEYS):
        if stored.is_complete("responses") and not is_other_policy:
            stored.update(accepted=_user_settings(now))
        else:
            _start_over(stored, now, fresh, "its settings have changed")
            return
    if is_other_policy:
        if stored.is_complete("training") and not accept:
            raise ChangedSettingsError(
                f"{stored.path} was sampled and trained on by another policy than that of this checkpoint. Use another "
                "run directory (--trainer.default_root_dir DIR), resume from the newest checkpoint (no --ckpt_path), "
                "or add --accept_changes to make this round and those after it again."
            )
        _start_over(stored, now, fresh, "the policy has changed")
        return
    changed = find_first_change(before, now, ORDER[1:])
    if changed is not None:
        lines = list_differences(before[changed], now[changed])
        if any(name in stored.manifest["stages"] or stored.shards(name) for name in ORDER[ORDER.index(changed) :]):
            console.print(f"{stored.name} is {REDONE[changed]} again: {'; '.join(lines)}", soft_wrap=True)
        stored.clear(changed)
    if before != now:
        stored.update(settings={**now, "responses": before["responses"]} if "accepted" in stored.manifest else now)


def _start_over(stored: Round, now: StageSettings, fresh: Mapping[str, Any], reason: str) -> None:
    if stored.manifest["stages"] or stored.shards("responses"):
        console.print(f"{stored.name} is made again: {reason}.", soft_wrap=True)
    stored.delete()
    stored.update(settings=now, **fresh)
