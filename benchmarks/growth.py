"""Time and memory of a round as its size grows: a tiny model, 100, 1,000 and 10,000 prompts.

python -m benchmarks.growth

With made-up responses, which need no sampling, every stage of a large round:

python -m benchmarks.growth --made_up --prompts 60000 --responses 5 --tokens 400
"""

import json
import tempfile
import time
from pathlib import Path

from benchmarks import made_up
from benchmarks.common import describe_machine, format_table, make_parser, peak_memory, run_in_process


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--prompts", type=int, action="append")
    parser.add_argument("--made_up", action="store_true", help="use random responses, and measure each stage")
    parser.add_argument("--responses", type=int, default=5, help="with --made_up: responses per prompt")
    parser.add_argument("--tokens", type=int, default=400, help="with --made_up: mean tokens per response")
    parser.add_argument("--parquet", action="store_true", help="with --made_up: prompts from a Parquet file")
    args = parser.parse_args()
    print(f"{describe_machine()}\n")
    if args.made_up:
        for count in args.prompts or [60_000]:
            print(f"{count:,} prompts x {args.responses} responses x {args.tokens} tokens\n")
            suffix = ".parquet" if args.parquet else ".jsonl"
            results = made_up.measure(count, args.responses, args.tokens, run_in_process, suffix)
            lines = [[stage, f"{seconds:.1f}", f"{gib:.2f}"] for stage, seconds, gib in results]
            print(format_table(["stage", "seconds", "peak GiB above the start"], lines), flush=True)
        return
    counts = args.prompts or [100, 1000, 10_000]
    rows = []
    for count in counts:
        result = run_in_process(measure, count)
        phases = [result[name] for name in ("generate", "score", "logps", "train")]
        rest = result["seconds"] - sum(phases)
        cells = [f"{s:.1f}" for s in (result["seconds"], *phases, rest)]
        rows.append([f"{count:,}", *cells, f"{1000 * result['seconds'] / count:.1f}", f"{result['gib']:.2f}"])
    header = ["prompts", "round, s", "generate", "score", "log-probs", "train", "rest", "ms per prompt", "peak GiB"]
    print(format_table(header, rows))


def measure(count: int) -> dict[str, float]:
    import lightning as L

    from rlhf_pl import RebelModule, RoundDataModule, SamplingConfig, VLLMSampler
    from rlhf_pl.callbacks import RoundRefresh
    from tests.conftest import save_llama

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_llama(folder / "model")
        with (folder / "prompts.jsonl").open("w") as file:
            for i in range(count):
                file.write(json.dumps({"prompt_id": str(i), "prompt": f"What is {i} plus {i + 1}?"}) + "\n")
        L.seed_everything(0, verbose=False)
        refresh = RoundRefresh(
            reward="benchmarks.growth.variety",
            sampler=VLLMSampler(dtype="float32", kv_cache_gib=0.2),
            sampling=SamplingConfig(num_responses=4, max_response_tokens=8),
        )
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            accumulate_grad_batches=4,
            default_root_dir=folder / "run",
            callbacks=[refresh],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = RoundDataModule(str(folder / "prompts.jsonl"), batch_size=16, max_prompt_tokens=64, val_prompts=0)
        with peak_memory() as peak:
            started = time.monotonic()
            trainer.fit(RebelModule(str(folder / "model")), datamodule=data)
            seconds = time.monotonic() - started
        stored = data.store.round(0)
        stages = {"generate": "responses", "score": "rewards", "logps": "logps", "train": "training"}
        times = {name: float(stored.info(stage)["seconds"]) for name, stage in stages.items()}
    return {"seconds": seconds, "gib": peak["gib"], **times}


def variety(response: str) -> float:
    """A reward that differs between responses."""
    return len(set(response)) / 10


if __name__ == "__main__":
    main()
