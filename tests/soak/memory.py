"""Memory of a run over many rounds of a tiny model: prints what is resident after each, and fails if it grows.

    python -m tests.soak.memory [--rounds 40] [--grows_mib 40] [--settling 10]

The first rounds fill caches, so growth counts from round `settling` on: the mean of the last rounds against that of as
many after it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

from tests.conftest import save_llama


def run(folder: Path, rounds: int) -> list[float]:
    """MiB that are resident at the start of every round's training, as the run logs them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [{"prompt_id": f"p{i}", "prompt": f"What is {i} plus {i}?"} for i in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "reward.py").write_text("def score(response):\n    return len(set(response)) / 10\n")
    options = {
        **{"model.policy": save_llama(folder / "llama"), "model.optimizer.lr": "1e-4"},
        **{"data.prompts": folder / "prompts.jsonl", "data.prompts_per_round": 8, "data.val_prompts": 2},
        **{"data.max_prompt_tokens": 64, "rollout.reward": f"{folder}/reward.py:score"},
        **{"rollout.sampler": "TransformersSampler", "rollout.val_num_responses": 2},
        **{"rollout.sampling.max_response_tokens": 16, "rollout.sampling.num_responses": 3},
        **{"trainer.max_epochs": rounds, "trainer.accelerator": "cpu", "trainer.default_root_dir": folder / "run"},
    }
    listed = [str(text) for name, value in options.items() for text in (f"--{name}", value)]
    subprocess.run([sys.executable, "-m", "rlhf_pl", "fit", *listed], check=True, stdout=subprocess.DEVNULL)
    curves = EventAccumulator(str(folder / "run" / "tensorboard"))
    curves.Reload()
    return [event.value * 1024 for event in curves.Scalars("system/resident_gib")]


def growth(resident: list[float], settling: int) -> float:
    """MiB, mean against mean of as many rounds: a quarter of those after the first `settling`."""
    settled = resident[settling:]
    count = max(1, len(settled) // 4)
    return mean(settled[-count:]) - mean(settled[:count])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--grows_mib", type=float, default=40.0, help="Growth that is let pass.")
    parser.add_argument("--settling", type=int, default=10, help="Rounds at the beginning that do not count.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        resident = run(Path(folder), given.rounds)
    for number, size in enumerate(resident, 1):
        print(f"round {number}: {size:.0f} MiB")
    grown = growth(resident, given.settling)
    print(f"from round {given.settling + 1} on: {grown:+.1f} MiB, of {given.grows_mib:g} that are let pass")
    return int(grown > given.grows_mib)


if __name__ == "__main__":
    sys.exit(main())
