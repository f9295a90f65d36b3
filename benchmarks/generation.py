"""Tokens per second of our sampler against bare vLLM: the same prompts, settings and seeds, in turn.

python -m benchmarks.generation
"""

import argparse
import json
import time
from typing import Any

from benchmarks.common import MODEL, PROFILES, in_a_process, machine, make_pairs, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--num_responses", type=int, default=4)
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", choices=("rlhf-pl", "vllm"))
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return
    print(machine())
    print(f"{args.prompts} prompts x {args.num_responses} answers of up to {args.max_tokens} tokens; best runs\n")
    keep = ("model", "prompts", "num_responses", "max_tokens", "repeats")
    options = [text for name in keep for text in (f"--{name}", str(getattr(args, name)))]
    found = {name: in_a_process(__file__, ["--one", name, *options]) for name in ("vllm", "rlhf-pl", "vllm", "rlhf-pl")}
    rows = [[name, f"{result['tokens_per_s']:.0f}"] for name, result in found.items()]
    print(table(["", "tokens/s"], rows))
    assert found["vllm"]["tokens"] == found["rlhf-pl"]["tokens"], "not the same answers"
    print(f"\nrlhf-pl at {found['rlhf-pl']['tokens_per_s'] / found['vllm']['tokens_per_s']:.1%} of bare vLLM")


def measure(args: argparse.Namespace) -> dict[str, float]:
    from rlhf_pl.devices import fast_dtype
    from rlhf_pl.policy import PolicySource, load_lm
    from rlhf_pl.rollout import EngineSpec, PromptTokens, SamplingConfig, VLLMSampler

    source = PolicySource(args.model)
    prompts = [p.prompt for p in make_pairs(PROFILES["short"], args.prompts, 40_000)]
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

    run = with_ours if args.one == "rlhf-pl" else bare
    best, tokens = 0.0, run()
    for _ in range(args.repeats):
        ours.reset()
        started = time.monotonic()
        assert run() == tokens
        best = max(best, tokens / (time.monotonic() - started))
    ours.close()
    return {"tokens_per_s": best, "tokens": tokens}


if __name__ == "__main__":
    main()
