"""Model FLOPs utilization (MFU): the minimum FLOPs of a training step, relative to a GPU's measured matmul peak."""

import time
from collections.abc import Sequence
from typing import Any

from benchmarks.common import Pair


def measure_matmul_peak(size: int = 8192) -> float:
    """Measure the FLOP/s of a product of two large bfloat16 matrices on the current GPU."""
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


def minimum_flops(pairs: Sequence[Pair], config: Any) -> float:
    """FLOPs of forward and backward passes: each prompt once, the output head only at response tokens, attention."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    layer = config.hidden_size * (2 * heads + 2 * kv_heads) * size + 3 * config.hidden_size * config.intermediate_size
    total = 0.0
    for pair in pairs:
        prompt, responses = len(pair.prompt), (len(pair.chosen), len(pair.rejected))
        attended = sum((prompt + n) ** 2 / 2 for n in responses) - prompt**2 / 2
        total += 6 * (prompt + sum(responses)) * layer * config.num_hidden_layers
        total += 6 * sum(responses) * config.vocab_size * config.hidden_size
        total += 12 * config.num_hidden_layers * heads * size * attended
    return total


def count_tokens(pairs: Sequence[Pair]) -> int:
    """Tokens of all pairs, each prompt counted once."""
    return sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
