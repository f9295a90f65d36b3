"""Makes data/preferences.jsonl, the tutorial's comparisons: a model's answers, judged by examples/short_answer.py.

Each prompt of data/sft.jsonl is answered several times; answers whose scores differ clearly make pairs.
Usage: VLLM_ENABLE_V1_MULTIPROCESSING=0 python scripts/make_preferences.py MODEL > data/preferences.jsonl
"""

import itertools
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.short_answer import score

ANSWERS, PAIRS, CLEAR = 8, 2, 0.15  # answers and pairs a prompt, least difference in score


def main() -> None:
    from vllm import LLM, SamplingParams

    rows = [json.loads(line) for line in Path("data/sft.jsonl").read_text().splitlines()]
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    answers: list[list[tuple[float, str]]] = [[] for _ in rows]
    llm = LLM(sys.argv[1], dtype="bfloat16", max_model_len=256, enforce_eager=True, kv_cache_memory_bytes=2**30)
    sampling = SamplingParams(n=ANSWERS, temperature=0.8, max_tokens=80)
    for row, found, output in zip(rows, answers, llm.chat(chats, sampling), strict=True):
        for answer in output.outputs:
            text = answer.text.strip()
            if text:
                found.append((score(row["prompt"], text, answer.finish_reason == "stop"), text))
    for row, found in zip(rows, answers, strict=True):
        pairs = [(a, b) for a, b in itertools.permutations(found, 2) if a[0] - b[0] > CLEAR]
        random.Random(row["prompt_id"]).shuffle(pairs)
        for better, worse in pairs[:PAIRS]:
            print(json.dumps({"prompt": row["prompt"], "chosen": better[1], "rejected": worse[1]}, ensure_ascii=False))


if __name__ == "__main__":
    main()
