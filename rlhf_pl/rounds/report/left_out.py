"""What a round has left out, in words: prompts by reason, failed rewards by kind."""

from collections.abc import Mapping
from typing import Any

_PROMPTS = {
    "no_reward_difference": "no reward difference",
    "same_answer": "equal responses",
    "not_scored": "too few rewards",
    "truncated_response": "a truncated response",
}


def describe_dropped(dropped: Mapping[str, int]) -> str:
    """Numbers of prompts by the reason why they are left out, such as `4 with a truncated response`; empty for none."""
    return ", ".join(
        f"{count} with {_PROMPTS.get(reason, reason.replace('_', ' '))}" for reason, count in dropped.items() if count
    )


def describe_left_out(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """The prompts that a round leaves out, and its rewards that failed; empty for none.

    Args:
        stages: The stages of the round's manifest.
    """
    parts = []
    if dropped := describe_dropped(stages.get("pairs", {}).get("dropped", {})):
        parts.append(f"prompts: {dropped}")
    failed = [(count, kind.replace("_", " ")) for kind, count in stages.get("rewards", {}).get("failures", {}).items()]
    if rewards := ", ".join(f"{count} ({kind})" for count, kind in failed if count):
        parts.append(f"responses whose reward failed: {rewards}")
    return "; ".join(parts)
