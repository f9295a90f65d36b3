"""Tokens per second of our sampler and of bare vLLM: the same prompts, settings and seeds, alternating on one engine.

A sampler's responses are the same in every run, so the n-th step of the engine is the same work. The reported time is
the sum over steps of each step's shortest time, plus the shortest time outside the steps. Whole runs would differ by
ten percent on a busy machine.

    python -m benchmarks.generation
    python -m benchmarks.generation --device cuda --model random-1b --prompts 128 --max_tokens 256

On a GPU whole runs are compared, as steps return before their work is done; the times of a weight sync, before and
after sleep, are also shown.
"""

import argparse
import time
from typing import Any

from benchmarks.common import MODEL, PROFILES, describe_machine, format_table, make_pairs, make_parser, model_folder


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default=str(MODEL), help="a folder, or random-1b for a random Llama")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--num_responses", type=int, default=4)
    parser.add_argument("--max_tokens", type=int, default=32)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(describe_machine())
    responses = f"{args.num_responses} responses of up to {args.max_tokens} tokens, top_p {args.top_p:g}"
    print(f"{args.prompts} prompts x {responses}\n")
    with model_folder(args.model, args.device) as args.model:
        results = measure(args)
    speed = {name: tokens / (steps + outside) for name, (tokens, steps, outside) in results.items()}
    rows = [
        [name, f"{speed[name]:.1f}", f"{steps:.3f}", f"{1000 * outside:.1f}"]
        for name, (_, steps, outside) in results.items()
    ]
    print(format_table(["", "tokens/s", "engine steps, s", "outside steps, ms"], rows))
    print(f"\nrlhf-pl at {speed['rlhf-pl'] / speed['vllm']:.1%} of bare vLLM")


def sync_weights(args: argparse.Namespace, sampler: Any, weights: Any, when: str = "") -> None:
    """Sync weights to the engine; on a GPU the time of a second sync, without compilation, is shown."""
    for _ in range(2 if args.device == "cuda" else 1):
        started = time.perf_counter()
        sampler.invalidate_weights(weights)
        synchronize(args)
        invalidated = time.perf_counter()
        sampler.load_weights(weights.items())
        synchronize(args)
        done = time.perf_counter()
    if args.device == "cuda":
        print(f"{when}invalidate {invalidated - started:.3f} s, load {done - invalidated:.3f} s\n")


def synchronize(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        import torch

        torch.cuda.synchronize()


class StepClock:
    """Records the seconds of each step of an engine."""

    def __init__(self, engine: Any) -> None:
        self.seconds: list[float] = []
        step = engine.step

        def timed_step() -> Any:
            started = time.perf_counter()
            try:
                return step()
            finally:
                self.seconds.append(time.perf_counter() - started)

        engine.step = timed_step


def measure(args: argparse.Namespace) -> dict[str, tuple[int, float, float]]:
    """For each sampler: tokens of all responses, seconds in the engine's steps, seconds outside them."""
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

    def sample_with_ours() -> list[list[list[int]]]:
        requests = [PromptTokens(ids, 100 * i, logps=False) for i, ids in enumerate(prompts)]
        return [[r.token_ids for r in responses] for _, responses in sorted(ours.generate(requests, sampling))]

    def sample_with_vllm() -> list[list[list[int]]]:
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
        return [[list(response.token_ids) for response in output.outputs] for output in outputs]

    clock = StepClock(ours._llm.llm_engine)
    steps: dict[str, list[list[float]]] = {"vllm": [], "rlhf-pl": []}
    outside: dict[str, list[float]] = {"vllm": [], "rlhf-pl": []}
    runs = [("vllm", sample_with_vllm), ("rlhf-pl", sample_with_ours)]
    expected = {name: run() for name, run in runs}
    # in bfloat16 many tokens are equally likely, and ties at the edge of the nucleus are broken arbitrarily
    if not on_gpu and (args.top_p == 1 or dtype == "float32"):
        assert expected["vllm"] == expected["rlhf-pl"], "the responses differ"
    for repeat in range(args.repeats):
        for name, run in runs if repeat % 2 == 0 else reversed(runs):
            ours.reset()
            clock.seconds.clear()
            started = time.perf_counter()
            responses = run()
            seconds = time.perf_counter() - started
            if on_gpu:
                steps[name].append([seconds])
                outside[name].append(0.0)
                continue
            assert responses == expected[name], "the responses differ"
            steps[name].append(list(clock.seconds))
            outside[name].append(seconds - sum(clock.seconds))
    if on_gpu:
        ours.sleep()
        ours.wake()
        sync_weights(args, ours, weights, "after sleep: ")
    ours.close()
    return {
        name: (
            sum(len(response) for responses in expected[name] for response in responses),
            sum(map(min, zip(*steps[name], strict=True))),
            min(outside[name]),
        )
        for name, _ in runs
    }


if __name__ == "__main__":
    main()
