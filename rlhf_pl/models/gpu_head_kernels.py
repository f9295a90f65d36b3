"""Triton kernels of the output head, in their own module because Triton is installed only with GPUs."""

import triton
import triton.language as tl


@triton.jit
def _logit(raw, bias, columns, in_vocabulary, scale, cap, inverse, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """Logits divided by the temperature, and their derivative with respect to the raw product."""
    value = raw
    if HAS_BIAS:
        value += tl.load(bias + columns, mask=in_vocabulary, other=0.0).to(tl.float32)
    value *= scale
    slope = scale * inverse
    if HAS_CAP:
        squashed = 2.0 / (1.0 + tl.exp(-2.0 * value / cap)) - 1.0  # tanh
        value = cap * squashed
        slope = slope * (1.0 - squashed * squashed)
    return value * inverse, slope


@triton.jit
def forward(
    logits, bias, targets, logps, log_sum_exps, stride, size, scale, cap, inverse,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: writes the log-sum-exp of its logits to `log_sum_exps`, and the target's log-prob to `logps`."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    maximum = -float("inf")
    total = 0.0
    target_logit = 0.0
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        in_vocabulary = columns < size
        raw = tl.load(logits + row * stride + columns, mask=in_vocabulary, other=0.0)
        value, _ = _logit(raw, bias, columns, in_vocabulary, scale, cap, inverse, HAS_BIAS, HAS_CAP)
        target_logit += tl.sum(tl.where(columns == target, value, 0.0))
        value = tl.where(in_vocabulary, value, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(value))
        total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(value - new_maximum))
        maximum = new_maximum
    total = maximum + tl.log(total)
    tl.store(log_sum_exps + row, total)
    tl.store(logps + row, target_logit - total)


@triton.jit
def backward(
    logits, bias, targets, log_sum_exps, gradient, grad_logits, stride, size, scale, cap, inverse,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of a row: writes the gradient of the raw products to `grad_logits`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_vocabulary = columns < size
    raw = tl.load(logits + row * stride + columns, mask=in_vocabulary, other=0.0)
    value, slope = _logit(raw, bias, columns, in_vocabulary, scale, cap, inverse, HAS_BIAS, HAS_CAP)
    is_target = (columns == tl.load(targets + row)).to(tl.float32)
    result = tl.load(gradient + row) * slope * (is_target - tl.exp(value - tl.load(log_sum_exps + row)))
    tl.store(grad_logits + row * size + columns, result, mask=in_vocabulary)
