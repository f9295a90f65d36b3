"""Tokens per second of our sampler against bare vLLM: the same prompts, settings and seeds, by turns on one engine.

A sampler's answers are the same every time, so the n-th step of the engine is the same work in every run: the time of a
run is the sum of each step's shortest time in all runs of its kind, and of the shortest time outside the steps. Whole
runs differ by ten percent on a machine that has other things to do.

    python -m benchmarks.generation
    python -m benchmarks.generation --device cuda --model random-1b --prompts 128 --max_tokens 256

On a GPU whole runs are compared, since steps end before their work is done, and the times of a hand-over of weights and
of sleep are shown as well.
"""

import argparse
import time
from typing import Any

from benchmarks.common import MODEL, PROFILES, machine, make_pairs, make_parser, model_folder, table


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default=str(MODEL), help="a folder, or random-1b: 1.24 B, made on the spot")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--num_responses", type=int, default=4)
    parser.add_argument("--max_tokens", type=int, default=32)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(machine())
    answers = f"{args.num_responses} answers of up to {args.max_tokens} tokens, top_p {args.top_p:g}"
    print(f"{args.prompts} prompts x {answers}\n")
    with model_folder(args.model, args.device) as args.model:
        found = measure(args)
    speed = {name: tokens / (steps + outside) for name, (tokens, steps, outside) in found.items()}
    rows = [
        [name, f"{speed[name]:.1f}", f"{steps:.3f}", f"{1000 * outside:.1f}"]
        for name, (_, steps, outside) in found.items()
    ]
    print(table(["", "tokens/s", "engine's steps, s", "outside them, ms"], rows))
    print(f"\nrlhf-pl at {speed['rlhf-pl'] / speed['vllm']:.1%} of bare vLLM")


def sync_weights(args: argparse.Namespace, sampler: Any, weights: Any, when: str = "") -> None:
    """Bring weights into the engine; on a GPU the second time, which compiles nothing, is shown."""
    for _ in range(2 if args.device == "cuda" else 1):
        started = time.perf_counter()
        sampler.invalidate_weights(weights)
        wait(args)
        poisoned = time.perf_counter()
        sampler.load_weights(weights.items())
        wait(args)
        done = time.perf_counter()
    if args.device == "cuda":
        print(f"{when}poison {poisoned - started:.3f} s, weights {done - poisoned:.3f} s\n")


def wait(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        import torch

        torch.cuda.synchronize()


class StepClock:
    """Times the engine's steps."""

    def __init__(self, engine: Any) -> None:
        self.seconds: list[float] = []
        step = engine.step

        def timed() -> Any:
            started = time.perf_counter()
            try:
                return step()
            finally:
                self.seconds.append(time.perf_counter() - started)

        engine.step = timed


def measure(args: argparse.Namespace) -> dict[str, tuple[int, float, float]]:
    """For each sampler the tokens of all answers, and the seconds in and outside the engine's steps."""
    from rlhf_pl.models.policy import load_lm
    from rlhf_pl.models.source import ModelSource
    from rlhf_pl.rollout import EngineSpec, PromptTokens, SamplingConfig, VLLMSampler
    from rlhf_pl.utils.devices import fast_dtype

    source = ModelSource(args.model)
    vocabulary = source.config.get_text_config().vocab_size
    prompts = [p.prompt for p in make_pairs(PROFILES["short"], args.prompts, vocabulary, args.seed)]
    longest = max(map(len, prompts)) + args.max_tokens
    on_gpu = args.device == "cuda"
    dtype = fast_dtype("bfloat16", args.device) or "bfloat16"
    ours = VLLMSampler(dtype=dtype, gpu_memory_utilization=0.5)  # type: ignore[arg-type]
    ours.start(EngineSpec(source, longest, args.prompts * args.num_responses))
    weights = load_lm(source).to(args.device).state_dict()
    sync_weights(args, ours, weights)
    sampling = SamplingConfig(num_responses=args.num_responses, max_response_tokens=args.max_tokens, top_p=args.top_p)

    def with_ours() -> list[list[list[int]]]:
        requests = [PromptTokens(ids, 100 * i, logps=False) for i, ids in enumerate(prompts)]
        return [[r.token_ids for r in answers] for _, answers in sorted(ours.generate(requests, sampling))]

    def bare() -> list[list[list[int]]]:
        from vllm import SamplingParams

        llm: Any = ours._llm  # the same engine, called as vLLM's own documentation does
        params = [
            SamplingParams(
                n=args.num_responses,
                seed=100 * i,
                max_tokens=args.max_tokens,
                top_p=args.top_p,
                stop_token_ids=list(source.eos_token_ids),
                detokenize=False,
            )
            for i in range(len(prompts))
        ]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [[list(answer.token_ids) for answer in output.outputs] for output in outputs]

    clock = StepClock(ours._llm.llm_engine)
    steps: dict[str, list[list[float]]] = {"vllm": [], "rlhf-pl": []}
    outside: dict[str, list[float]] = {"vllm": [], "rlhf-pl": []}
    runs = [("vllm", bare), ("rlhf-pl", with_ours)]
    expected = {name: run() for name, run in runs}
    # in bfloat16 many tokens are equally likely, and which stay at the edge of the nucleus is open
    if not on_gpu and (args.top_p == 1 or dtype == "float32"):
        assert expected["vllm"] == expected["rlhf-pl"], "not the same answers"
    for repeat in range(args.repeats):
        for name, run in runs if repeat % 2 == 0 else reversed(runs):
            ours.reset()
            clock.seconds.clear()
            started = time.perf_counter()
            answers = run()
            seconds = time.perf_counter() - started
            if on_gpu:
                steps[name].append([seconds])
                outside[name].append(0.0)
                continue
            assert answers == expected[name], "not the same answers"
            steps[name].append(list(clock.seconds))
            outside[name].append(seconds - sum(clock.seconds))
    if on_gpu:
        ours.sleep()
        ours.wake()
        sync_weights(args, ours, weights, "after sleep: ")
    ours.close()
    return {
        name: (
            sum(len(answer) for answers in expected[name] for answer in answers),
            sum(map(min, zip(*steps[name], strict=True))),
            min(outside[name]),
        )
        for name, _ in runs
    }


if __name__ == "__main__":
    main()
