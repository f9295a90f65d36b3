"""Plots what helps to choose eta: targets against reached log-ratio margins, slope and R², KL, reward and eta.

Usage: python scripts/plot_eta.py OUT.png RUN_DIR [RUN_DIR ...]

The bins and the numbers by round come from the manifests, those by update from the TensorBoard events.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plot_runs import read_scalars

from rlhf_pl.rounds.metrics import choices, training_margins
from rlhf_pl.store.round_store import RoundStore


def plot_targets(axis: Any, color: str, manifest: Mapping[str, Any]) -> None:
    """A round's pairs, in bins by target: mean, 10 % and 90 % quantile of their log-ratio margins."""
    bins = training_margins(manifest).get("bins", {})
    x = bins.get("target", bins.get("reward", []))
    if not x:
        return
    axis.plot(x, bins["mean"], marker="o", markersize=3, color=color)
    axis.fill_between(x, bins["p10"], bins["p90"], alpha=0.15, color=color)
    if "target" in bins:
        axis.axline((0, 0), slope=1, color="grey", linewidth=0.8, linestyle="--")


def round_values(store: RoundStore) -> dict[str, tuple[list[int], list[float]]]:
    """Numbers by round, as (rounds, counted from 1; values): held-out reward from the starting policy, 0, on."""
    found: dict[str, dict[int, float | None]] = {"kl": {}, "reward": {}, "eta": {}}
    for index, stored in store.rounds().items():
        manifest = stored.manifest
        found["kl"][index + 1] = manifest["stages"].get("training", {}).get("kl")
        found["eta"][index + 1] = choices(manifest).get("eta")
        found["reward"][index] = manifest["stages"].get("rewards", {}).get("mean")
    for version, stored in store.evaluations().items():
        stages = stored.manifest["stages"]
        found["reward"][version] = stages.get("rewards", {}).get("mean")
        found["kl"][version] = stages.get("kl", {}).get("new_old", found["kl"].get(version))
    known = {name: {k: v for k, v in sorted(values.items()) if v is not None} for name, values in found.items()}
    return {name: (list(values), list(values.values())) for name, values in known.items()}


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), constrained_layout=True)
    ((targets, slopes, fits), (kls, rewards, etas)) = axes
    for number, run in enumerate(map(Path, sys.argv[2:])):
        store, label, color = RoundStore(run), run.name, f"C{number}"
        if not (rounds := store.rounds()):
            sys.exit(f"{run} holds no rounds.")
        plot_targets(targets, color, rounds[min(rounds)].manifest)
        for axis, tag in ((slopes, "train/slope"), (fits, "train/r2")):
            axis.plot(*read_scalars(run, tag), color=color)
        for axis, (x, y) in zip((kls, rewards, etas), round_values(store).values(), strict=True):
            axis.plot(x, y, marker="o", markersize=4, label=label, color=color)
    titles = {
        targets: ("first round: log-ratio margin against target, nats", "target (eta x reward margin)"),
        slopes: ("slope of log-ratio on reward margins (nats per reward unit)", "updates"),
        fits: ("R² of that line", "updates"),
        kls: ("KL of a round (nats; new||old where known)", "rounds"),
        rewards: ("mean reward (held-out prompts where there are any)", "rounds trained"),
        etas: ("eta (auto)", "rounds"),
    }
    for axis, (title, label) in titles.items():
        axis.set(title=title, xlabel=label)
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
        if axis is not targets:
            axis.xaxis.get_major_locator().set_params(integer=True)
    # far targets would squeeze the others
    targets.set(xscale="symlog", yscale="linear")
    kls.set(yscale="symlog")
    rewards.legend(fontsize=8)
    figure.savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()
