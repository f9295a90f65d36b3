"""TRL's GRPOTrainer on stored responses: its own training step, without generation and with given advantages."""

import argparse
import tempfile
import time
from typing import Any

from benchmarks.common import Pair, peak_memory

RESPONSES = 4  # to each prompt


def train_with_trl_grpo(args: argparse.Namespace, pairs: list[Pair], others: list[Pair]) -> tuple[list[float], float]:
    """Train on the responses of `pairs` and `others`, in updates of `args.pairs` prompts.

    The log-probs of pi_old are given; no reference. Each generation batch is one update, and TRL pads it to its longest
    prompt and response.

    Returns:
        (end time of each update, peak GiB).
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import pad

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if args.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.monotonic())

    class Stored(GRPOTrainer):
        """Takes stored responses in place of generated ones."""

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            start = len(times) * args.pairs
            rows = [
                (pair.prompt, response)
                for pair, other in zip(pairs[start : start + args.pairs], others[start:], strict=False)
                for response in (pair.chosen, pair.rejected, other.chosen, other.rejected)
            ]
            prompts, responses = ([torch.tensor(ids) for ids in column] for column in zip(*rows, strict=True))
            masks = [[torch.ones_like(ids) for ids in column] for column in (prompts, responses)]
            batch = {
                "prompt_ids": pad(prompts, self._tokenizer.pad_token_id, "left"),
                "prompt_mask": pad(masks[0], 0, "left"),
                "completion_ids": pad(responses, self._tokenizer.pad_token_id),
                "completion_mask": pad(masks[1], 0),
                "advantages": torch.randn(len(rows), generator=torch.Generator().manual_seed(start)),
            }
            batch["old_per_token_logps"] = torch.full(batch["completion_ids"].shape, -10.0)
            batch["num_items_in_batch"] = batch["completion_mask"].sum()
            return {name: values.to(self.accelerator.device) for name, values in batch.items()}

    with tempfile.TemporaryDirectory() as folder, peak_memory(args.device) as peak:
        config = GRPOConfig(
            folder,
            per_device_train_batch_size=RESPONSES * args.micro_batch,
            gradient_accumulation_steps=args.pairs // args.micro_batch,
            num_generations=RESPONSES,
            max_steps=len(pairs) // args.pairs,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=args.device == "cuda",
            beta=0.0,
            loss_type="grpo",
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=args.device == "cpu",
        )
        Stored(
            AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            reward_funcs=lambda prompts, **_: [0.0] * len(prompts),
            args=config,
            train_dataset=Dataset.from_list([{"prompt": "not used"}] * len(pairs)),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            callbacks=[Clock()],
        ).train()
    return times, peak["gib"]
