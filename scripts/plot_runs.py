"""Plots the curves of one or more runs from their TensorBoard events.

Usage: python scripts/plot_runs.py OUT.png RUN_DIR [RUN_DIR ...]
"""

import sys
from pathlib import Path

PANELS = [
    ("val/reward_mean", "reward on held-out prompts"),
    ("rollout/response_tokens", "tokens per response (of 64)"),
    ("rollout/finished_share", "fraction of finished responses"),
    ("train/kl", "KL from pi_old (nats)"),
]


def read_scalars(run: Path, tag: str) -> tuple[list[int], list[float]]:
    """Steps and values of a tag; newer event files overwrite older ones."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values: dict[int, float] = {}
    for file in sorted((run / "tensorboard").glob("events*")):
        events = EventAccumulator(str(file))
        events.Reload()
        if tag in events.Tags()["scalars"]:
            values.update({event.step: event.value for event in events.Scalars(tag)})
    return sorted(values), [values[step] for step in sorted(values)]


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 3.2), constrained_layout=True)
    for run in map(Path, sys.argv[2:]):
        for axis, (tag, title) in zip(axes, PANELS, strict=True):
            steps, values = read_scalars(run, tag)
            axis.plot(steps, values, marker="o" if len(steps) < 12 else None, markersize=4, label=run.name)
            axis.set(title=title, xlabel="updates")
            axis.title.set_fontsize(10)
            axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()
