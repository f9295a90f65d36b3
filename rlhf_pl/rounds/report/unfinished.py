"""Whether fewer responses end by themselves than at a run's start, a sign of a policy that only pleases the reward."""

from rlhf_pl.store.round_store import RoundStore

_FALL = 0.2  # of the share of finished responses


def describe_unfinished(store: RoundStore, version: int) -> str:
    """A sentence if much fewer responses to the held-out prompts finish than at the start; empty otherwise.

    Args:
        store: The run's rounds.
        version: Number of rounds that the policy has trained.
    """
    shares = []
    for stored in (store.held_out(0), store.held_out(version)):
        if not stored.is_complete("responses"):
            return ""
        shares.append(stored.info("responses")["finished_share"])
    if shares[0] - shares[1] < _FALL:
        return ""
    return (
        f"{shares[1]:.0%} of the responses to the held-out prompts finish, {shares[0]:.0%} at the start. Read some "
        f"({store.run_dir / 'samples.html'}): the reward may pay for text that nobody wants. Give unfinished responses "
        "less (`rollout.shaping.missing_eos_penalty`), or lower `--model.optimizer.lr`"
    )
