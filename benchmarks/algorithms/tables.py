"""Tables of the results, with standard errors over seeds."""

import math
from collections.abc import Sequence

from benchmarks.algorithms.results import TUNING, Results, Run
from benchmarks.algorithms.variants import ALL
from benchmarks.all_pairs import mean, reward_at
from benchmarks.common import format_table


def tuning_table(results: Results) -> str:
    """Mean reward over a run by learning rate, and in brackets that at the end."""
    rows = []
    for name, variant in ALL.items():
        if results.select(name, TUNING):
            rates = results.task.rates
            rows.append([variant.label, *(_tuning_cell(results, name, rate) for rate in rates)])
    return format_table(["learning rate", *(f"{rate:g}" for rate in results.task.rates)], rows)


def _tuning_cell(results: Results, name: str, rate: float) -> str:
    rewards = results.tuning_rewards(name, rate)
    ends = [run.curve[-1]["reward"] for run in results.select(name, TUNING, rate) if run.curve]
    if not rewards:
        return ""
    if len(ends) < len(rewards):
        return f"{len(rewards) - len(ends)} of {len(rewards)} failed"
    text = f"{with_error(rewards)} ({mean(ends):.3f})"
    return f"**{text}**" if rate == results.best_rate(name) else text


def final_table(results: Results) -> str:
    """Reward at equal samples, at equal CPU time and at equal KL to the start; KL and entropy at the end.

    The time is that of the shortest run, and the KL the largest that every run has reached.
    """
    runs = results.finals()
    every = [run for found in runs.values() for run in found]
    if not every:
        return "No final runs yet."
    points = every[0].curve
    middle, last = (points[i]["samples"] for i in (len(points) // 2, -1))
    seconds = min(run.curve[-1]["seconds"] for run in every)
    kl = min(max(point["kl"] for point in run.curve) for run in every)
    header = ["", "rate", f"reward after {middle:g} responses", f"after {last:g}"]
    header += [f"after {seconds:.1f} CPU s", f"at a KL of {kl:.0f}"]
    header += ["KL to the start at the end, nats", "entropy, nats/token", "CPU s", "reward at the end by seed"]
    rows = []
    for name, found in runs.items():
        ends = [run.curve[-1] for run in found]
        at = {"samples": (middle, last), "seconds": (seconds,), "kl": (kl,)}
        row = [ALL[name].label, f"{results.best_rate(name):g}"]
        row += [with_error([_reward_at(run, key, v) for run in found]) for key, values in at.items() for v in values]
        row += [with_error([end["kl"] for end in ends], 1), with_error([end["entropy"] for end in ends], 2)]
        row += [f"{mean([end['seconds'] for end in ends]):.1f}", " ".join(f"{end['reward']:.2f}" for end in ends)]
        rows.append(row)
    return format_table(header, rows)


def _reward_at(run: Run, key: str, value: float) -> float:
    """The reward where `key` is `value` for the first time, between two evaluations on a line."""
    return reward_at([(int(point["samples"]), point[key], point["reward"]) for point in run.curve], value)


def with_error(values: Sequence[float], digits: int = 3) -> str:
    """The mean and its standard error."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    center = mean(values)
    error = math.sqrt(sum((v - center) ** 2 for v in values) / (len(values) - 1) / len(values))
    return f"{center:.{digits}f} ± {error:.{digits}f}"
