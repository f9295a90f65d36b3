"""Tokens per second of our sampler against bare vLLM: the same prompts, settings and seeds, by turns on one engine.

python -m benchmarks.generation
"""

import argparse
import time
from typing import Any

from benchmarks.common import MODEL, PROFILES, machine, make_pairs, make_parser, table


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--num_responses", type=int, default=4)
    parser.add_argument("--max_tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(machine())
    print(f"{args.prompts} prompts x {args.num_responses} answers of up to {args.max_tokens} tokens; best runs\n")
    found = measure(args)
    print(table(["", "tokens/s"], [[name, f"{speed:.0f}"] for name, speed in found.items()]))
    print(f"\nrlhf-pl at {found['rlhf-pl'] / found['vllm']:.1%} of bare vLLM")


def measure(args: argparse.Namespace) -> dict[str, float]:
    from rlhf_pl.devices import fast_dtype
    from rlhf_pl.policy import PolicySource, load_lm
    from rlhf_pl.rollout import EngineSpec, PromptTokens, SamplingConfig, VLLMSampler

    source = PolicySource(args.model)
    prompts = [p.prompt for p in make_pairs(PROFILES["short"], args.prompts, 40_000, args.seed)]
    longest = max(map(len, prompts)) + args.max_tokens
    dtype = fast_dtype("bfloat16", "cpu") or "bfloat16"
    ours = VLLMSampler(dtype=dtype)  # type: ignore[arg-type]
    ours.start(EngineSpec(source, longest, args.prompts * args.num_responses))
    ours.load_weights(load_lm(source).state_dict().items())
    sampling = SamplingConfig(num_responses=args.num_responses, max_response_tokens=args.max_tokens)

    def with_ours() -> int:
        requests = [PromptTokens(ids, 100 * i) for i, ids in enumerate(prompts)]
        return sum(len(r.token_ids) for _, answers in ours.generate(requests, sampling) for r in answers)

    def bare() -> int:
        from vllm import SamplingParams

        llm: Any = ours._llm  # the same engine, called as vLLM's own documentation does
        params = [
            SamplingParams(
                n=args.num_responses,
                seed=100 * i,
                max_tokens=args.max_tokens,
                logprobs=0,
                stop_token_ids=list(source.eos_token_ids),
                detokenize=False,
            )
            for i in range(len(prompts))
        ]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return sum(len(answer.token_ids) for output in outputs for answer in output.outputs)

    best = {"vllm": 0.0, "rlhf-pl": 0.0}
    expected = with_ours()
    for _ in range(args.repeats):
        for name, run in (("vllm", bare), ("rlhf-pl", with_ours)):
            ours.reset()
            started = time.monotonic()
            tokens = run()
            assert tokens == expected, "not the same answers"
            best[name] = max(best[name], tokens / (time.monotonic() - started))
    ours.close()
    return best


if __name__ == "__main__":
    main()
