"""Triton kernels of the output head; a module of their own because Triton is there on GPUs alone."""

import triton
import triton.language as tl


@triton.jit
def _logit(raw, bias, places, inside, scale, cap, inverse, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """Logits over the temperature, and what their derivative by the raw product is."""
    value = raw
    if HAS_BIAS:
        value += tl.load(bias + places, mask=inside, other=0.0).to(tl.float32)
    value *= scale
    slope = scale * inverse
    if HAS_CAP:
        squashed = 2.0 / (1.0 + tl.exp(-2.0 * value / cap)) - 1.0  # tanh
        value = cap * squashed
        slope = slope * (1.0 - squashed * squashed)
    return value * inverse, slope


@triton.jit
def forward(
    logits, bias, targets, logps, totals, stride, size, scale, cap, inverse,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row: log-sum-exp of its logits into `totals`, and the target's log-prob into `logps`."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    top = -float("inf")
    total = 0.0
    wanted = 0.0
    for start in range(0, size, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < size
        raw = tl.load(logits + row * stride + places, mask=inside, other=0.0)
        value, _ = _logit(raw, bias, places, inside, scale, cap, inverse, HAS_BIAS, HAS_CAP)
        wanted += tl.sum(tl.where(places == target, value, 0.0))
        value = tl.where(inside, value, -float("inf"))
        higher = tl.maximum(top, tl.max(value))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(value - higher))
        top = higher
    total = top + tl.log(total)
    tl.store(totals + row, total)
    tl.store(logps + row, wanted - total)


@triton.jit
def backward(
    logits, bias, targets, totals, gradient, of_logits, stride, size, scale, cap, inverse,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a row: the gradient of the raw products."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    raw = tl.load(logits + row * stride + places, mask=inside, other=0.0)
    value, slope = _logit(raw, bias, places, inside, scale, cap, inverse, HAS_BIAS, HAS_CAP)
    chosen = (places == tl.load(targets + row)).to(tl.float32)
    found = tl.load(gradient + row) * slope * (chosen - tl.exp(value - tl.load(totals + row)))
    tl.store(of_logits + row * size + places, found, mask=inside)
