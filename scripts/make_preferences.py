"""Makes data/preferences.jsonl, the tutorial's comparisons: a model's responses, judged by examples/short_answer.py.

Several responses are sampled for each prompt of data/sft.jsonl; responses with clearly different scores make pairs.
Usage: VLLM_ENABLE_V1_MULTIPROCESSING=0 python scripts/make_preferences.py MODEL > data/preferences.jsonl
"""

import itertools
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.short_answer import score

RESPONSES, PAIRS, MIN_MARGIN = 8, 2, 0.15  # responses and pairs per prompt, minimum difference of scores


def main() -> None:
    from vllm import LLM, SamplingParams

    rows = [json.loads(line) for line in Path("data/sft.jsonl").read_text().splitlines()]
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    responses: list[list[tuple[float, str]]] = [[] for _ in rows]
    llm = LLM(sys.argv[1], dtype="bfloat16", max_model_len=256, enforce_eager=True, kv_cache_memory_bytes=2**30)
    sampling = SamplingParams(n=RESPONSES, temperature=0.8, max_tokens=80)
    for row, scored, output in zip(rows, responses, llm.chat(chats, sampling), strict=True):
        for completion in output.outputs:
            text = completion.text.strip()
            if text:
                scored.append((score(row["prompt"], text, completion.finish_reason == "stop"), text))
    for row, scored in zip(rows, responses, strict=True):
        pairs = [(a, b) for a, b in itertools.permutations(scored, 2) if a[0] - b[0] > MIN_MARGIN]
        random.Random(row["prompt_id"]).shuffle(pairs)
        for chosen, rejected in pairs[:PAIRS]:
            print(
                json.dumps({"prompt": row["prompt"], "chosen": chosen[1], "rejected": rejected[1]}, ensure_ascii=False)
            )


if __name__ == "__main__":
    main()
