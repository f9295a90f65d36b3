"""What a GPU could do, and the least that a training step must do: the share of the one by the other is the MFU."""

import time
from collections.abc import Sequence
from typing import Any

from benchmarks.common import Pair


def matmul_peak(size: int = 8192) -> float:
    """FLOP/s of a product of two large bfloat16 matrices on the current GPU, measured now."""
    import torch

    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    started = time.monotonic()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * size**3 / (time.monotonic() - started)


def least_flops(pairs: Sequence[Pair], config: Any) -> float:
    """Of forward and backward passes: each prompt once, the output head at response tokens alone, and attention."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    layer = config.hidden_size * (2 * heads + 2 * kv_heads) * size + 3 * config.hidden_size * config.intermediate_size
    total = 0.0
    for pair in pairs:
        prompt, answers = len(pair.prompt), (len(pair.chosen), len(pair.rejected))
        seen = sum((prompt + n) ** 2 / 2 for n in answers) - prompt**2 / 2
        total += 6 * (prompt + sum(answers)) * layer * config.num_hidden_layers
        total += 6 * sum(answers) * config.vocab_size * config.hidden_size
        total += 12 * config.num_hidden_layers * heads * size * seen
    return total


def tokens_of(pairs: Sequence[Pair]) -> int:
    """Tokens, prompts once."""
    return sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
