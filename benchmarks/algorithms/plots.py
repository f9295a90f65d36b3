"""Plots of the final runs: reward against KL to the start, samples and CPU time."""

from benchmarks.algorithms.results import Results
from benchmarks.algorithms.variants import VARIANTS

AXES = {"kl": "KL to the start, nats per response", "samples": "responses sampled", "seconds": "CPU seconds"}


def plot(tasks: list[Results], file: str) -> None:
    """A row of panels for each task; a thin line is a run, the thick one the mean of an algorithm's runs."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(len(tasks), len(AXES), figsize=(12, 3.6 * len(tasks)), sharey="row", squeeze=False)
    for row, results in zip(panels, tasks, strict=True):
        for (key, label), axes in zip(AXES.items(), row, strict=True):
            for number, name in enumerate(VARIANTS):
                runs = results.finals().get(name, [])
                for run in runs:
                    values = [[p[k] for p in run.curve] for k in (key, "reward")]
                    axes.plot(*values, color=f"C{number}", linewidth=0.6, alpha=0.35)
                if runs:
                    points = list(zip(*(run.curve for run in runs), strict=True))
                    means = [[sum(p[k] for p in at) / len(at) for at in points] for k in (key, "reward")]
                    axes.plot(*means, color=f"C{number}", linewidth=2, label=VARIANTS[name].label)
            axes.set_xlabel(label)
        row[0].set_ylabel(f"held-out reward, {results.name}")
    panels[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=80)
