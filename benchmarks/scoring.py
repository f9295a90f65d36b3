"""Responses per second of a reward model: in our batches of similar length with shared prompts, and one at a time.

python -m benchmarks.scoring
python -m benchmarks.scoring --device cuda --model random-1b --prompts 64
"""

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.common import MODEL, describe_machine, format_table, make_parser, model_folder

WORDS = "sea sky hill river stone light morning window paper garden quiet winter letter engine forest"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default=str(MODEL), help="base of the reward model, which gets a random head")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--num_responses", type=int, default=4)
    parser.add_argument("--prompt_words", type=int, default=60)
    parser.add_argument("--response_words", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with model_folder(args.model, args.device) as args.model:
        measure(args)


def measure(args: argparse.Namespace) -> None:
    import random

    from transformers import AutoTokenizer

    from rlhf_pl.models.sequence_classifier import new_classifier
    from rlhf_pl.models.source import ModelSource
    from rlhf_pl.rewards import ClassifierReward, Sample

    print(describe_machine())
    rng, words = random.Random(args.seed), WORDS.split()

    def text(mean: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(mean // 2, mean * 3 // 2)))

    samples = []
    for number in range(args.prompts):
        chat = [{"role": "user", "content": text(args.prompt_words)}]
        samples += [Sample(str(number), chat, text(args.response_words)) for _ in range(args.num_responses)]
    with tempfile.TemporaryDirectory() as name:
        model = new_classifier(ModelSource(args.model), seed=1)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
        dtype = "bfloat16" if args.device == "cuda" else "float32"
        reward = ClassifierReward(str(Path(name)), dtype=dtype, device=args.device)  # type: ignore[arg-type]
        reward.score(samples[:1])
        started = time.monotonic()
        alone = [reward.score([sample])[0].reward for sample in samples]
        alone_end = time.monotonic()
        together = [result.reward for result in reward.score(samples)]
        together_end = time.monotonic()
    error = max(abs(a - b) for a, b in zip(alone, together, strict=True))
    assert error < (1e-3 if args.device == "cpu" else 0.1), f"scores differ by {error}"
    seconds = alone_end - started, together_end - alone_end
    speed_alone, speed_together = (len(samples) / s for s in seconds)
    rows = [["one at a time", f"{speed_alone:.2f}"], ["rlhf-pl", f"{speed_together:.2f}"]]
    print(f"{args.prompts} prompts x {args.num_responses} responses; largest difference of scores {error:.0e}\n")
    print(format_table(["", "responses/s"], rows))
    print(f"\n{speed_together / speed_alone:.2f}x")


if __name__ == "__main__":
    main()
