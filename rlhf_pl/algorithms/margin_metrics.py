"""How far a policy has followed the reward margins of its pairs, and which pairs its gradient comes from."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_pl.algorithms.policy_loss import PairwiseLoss, PolicyLoss, reward_margins
from rlhf_pl.algorithms.prompt_groups import SUMMED, PromptGroups

# numbers of a pair: log-ratio margin (nats), reward margin (reward units), target of the former (nats; NaN where the
# loss has none), weight (1 over the pairs of its prompt), and |dL/d log-ratio margin| times weight (NaN if not known)
COLUMNS = ("logratio", "reward", "target", "weight", "gradient")
LARGEST = 20  # one pair in 20 is among the largest 5 %
_BINS, _BIN_PAIRS = 10, 5  # bins of a round's pairs at most, and pairs in a bin at least


def has_margins(loss: PolicyLoss, needs: Collection[str]) -> bool:
    """Whether a loss is on pairs with log-ratios."""
    return loss.uses_pairs and any(name in needs for name in SUMMED)


def margin_metric_names(loss: PolicyLoss, needs: Collection[str], held_out: bool = False) -> tuple[str, ...]:
    """Names of the metrics of `margin_metrics`. Held-out pairs have no gradient."""
    if not has_margins(loss, needs):
        return ()
    targets = ("target_p50", "target_p95") if any(_has_targets(term) for _, term in loss.terms) else ()
    gradient = () if held_out or all(term.per != "pair" for _, term in loss.terms) else ("gradient_top5",)
    return ("slope", "r2", "reached_p50", "reached_p95", *targets, *gradient)


def _has_targets(loss: PolicyLoss) -> bool:
    return isinstance(loss, PairwiseLoss) and type(loss).targets is not PairwiseLoss.targets


def pair_columns(loss: PolicyLoss, groups: PromptGroups, losses: Sequence[Tensor] | None = None) -> Tensor:
    """The `COLUMNS` of a batch's P pairs, shape (5, P), float32, on the device of the batch.

    Args:
        loss: The loss.
        groups: Its input.
        losses: Values of its terms, with their graph, for those on pairs a mean over each prompt; None for held-out
            pairs, which have no gradient.
    """
    base = groups.stored["old_logps" if "old_logps" in groups.stored else "reference_logps"]
    gradient = None if losses is None else _pair_gradient(loss, groups, losses)
    with torch.no_grad():
        rewards, (chosen, rejected) = reward_margins(groups), groups.pair_logps - groups.pairs(base)
        targets = next((term.targets(rewards) for _, term in loss.terms if _has_targets(term)), None)  # type: ignore[attr-defined]
        unknown = torch.full_like(rewards, math.nan)
        weight = torch.ones_like(rewards) if groups.pair_sizes is None else 1 / groups.pair_sizes.float()
        if groups.pair_sizes is not None:
            weight = torch.repeat_interleave(weight, groups.pair_sizes, output_size=len(rewards))
        margin_gradient = unknown if gradient is None else (gradient[0] - gradient[1]).abs() / 2
        return torch.stack(
            [chosen - rejected, rewards, unknown if targets is None else targets, weight, margin_gradient]
        )


def _pair_gradient(loss: PolicyLoss, groups: PromptGroups, losses: Sequence[Tensor]) -> Tensor | None:
    """Gradient of the terms on pairs for each pair's two log-probs, shape (2, P); None where they do not reach it."""
    logps = groups.pair_logps
    terms = zip(loss.terms, losses, strict=True)
    sums = [weight * values.sum() for (weight, term), values in terms if term.per == "pair"]
    total = sum(sums, torch.zeros((), device=logps.device))
    if not total.requires_grad:  # also without a term on pairs
        return None
    return torch.autograd.grad(total, logps, retain_graph=True, allow_unused=True)[0]


def margin_metrics(columns: Tensor) -> dict[str, float]:
    """Metrics of pairs, as far as they are defined.

    Args:
        columns: The `COLUMNS` of all pairs of an update, or of all held-out pairs; shape (5, P), float64.

    Returns:
        `slope` and `r2` from `fit_through_origin` of log-ratio margins on reward margins; `reached_p50`, `reached_p95`,
        `target_p50`, `target_p95`: quantiles of the absolute log-ratio margins and targets, nats; `gradient_top5`:
        the share of the sum of |dL/d log-ratio margin| that the largest 5 % of the pairs have, at least one pair.
    """
    logratios, rewards, targets, weights, gradients = columns
    metrics = fit_through_origin(rewards, logratios, weights)
    for name, values in (("reached", logratios), ("target", targets)):
        if len(values) and not values.isnan().any():
            middle, high = torch.quantile(values.abs(), torch.tensor([0.5, 0.95], dtype=values.dtype)).tolist()
            metrics |= {f"{name}_p50": middle, f"{name}_p95": high}
    if len(gradients) and (total := gradients.sum()) > 0:
        largest = gradients.topk(max(1, len(gradients) // LARGEST)).values
        metrics["gradient_top5"] = float(largest.sum() / total)
    return metrics


def fit_through_origin(x: Tensor, y: Tensor, weights: Tensor) -> dict[str, float]:
    """Weighted regression y = slope x without a constant: the order of a pair is arbitrary, so (-x, -y) counts alike.

    Args:
        x: Shape (P,), float64.
        y: The same.
        weights: Not negative, shape (P,).

    Returns:
        `slope` = sum w x y / sum w x^2, and `r2` = 1 - sum w (y - slope x)^2 / sum w y^2, relative to y = 0. The former
        is left out where all of x is 0, the latter where all of x or y is.
    """
    xx, xy, yy = (float((weights * a * b).sum()) for a, b in ((x, x), (x, y), (y, y)))
    if xx == 0:
        return {}
    return {"slope": xy / xx, **({"r2": (xy / xx) * (xy / yy)} if yy > 0 else {})}


def summarise_margins(columns: Tensor) -> dict[str, Any]:
    """Metrics of all pairs of a round for its manifest, with a picture of targets against log-ratio margins.

    Args:
        columns: As for `margin_metrics`.

    Returns:
        The metrics; `reached`, the slope of log-ratio margins on targets: 1 where the policy meets them; and `bins`,
        which divide the pairs by target: mean target and mean, 10 % and 90 % quantile of the log-ratio margin of each,
        nats. Without targets the bins are by reward margin.
    """
    logratios, rewards, targets, weights, _ = columns
    found: dict[str, Any] = dict(margin_metrics(columns))
    has_targets = bool(len(targets)) and not bool(targets.isnan().any())
    if has_targets and (fit := fit_through_origin(targets, logratios, weights)):
        found["reached"] = fit["slope"]
    axis = targets if has_targets else rewards
    parts = axis.argsort(stable=True).tensor_split(max(1, min(_BINS, len(axis) // _BIN_PAIRS)))
    found["bins"] = {
        "target" if has_targets else "reward": [float(axis[part].mean()) for part in parts],
        "mean": [float(logratios[part].mean()) for part in parts],
        **{f"p{q}": [float(torch.quantile(logratios[part], q / 100)) for part in parts] for q in (10, 90)},
    }
    return found
