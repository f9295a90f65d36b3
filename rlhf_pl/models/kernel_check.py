"""Whether fast paths give what plain layers give, tried where and how the run computes, on a small random copy."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pl.models.compute import Compute
from rlhf_pl.models.packed_batch import PackedBatch, PrefixGroup, pack, padded
from rlhf_pl.models.rotary import steady_rotary
from rlhf_pl.models.small_copy import make_peaked, narrow, small_config

# what rounding explains: a fast path may be as far from float32 as so many times the plain layers in the same dtype
TIMES_PLAIN = 2.0
FLOOR = 2e-5  # and this far, relative, in any case
MOST_PARAMETERS = 250_000_000

# of a model that is not made for something
FAILURES = (
    TypeError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    IndexError,
    AttributeError,
    KeyError,
    AssertionError,
)
_done: dict[tuple[str, ...], Any] = {}


@dataclass(frozen=True)
class Copies:
    """A small random model twice, both with eager attention.

    Args:
        exact: Computes in float32.
        plain: The same weights in the dtype of the run; a fast path is put into it and tried.
        compute: Where and how.
        batch: Trees, longer than the models' windows.
    """

    exact: Any
    plain: Any
    compute: Compute
    batch: PackedBatch

    def hidden(self, model: Any) -> Tensor:
        """States of the backbone at the tokens that predict, from padded rows, shape (M, H), float32."""
        ids, mask = padded(self.batch.input_ids, self.batch.lengths)
        with self._autocast(model):
            rows = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        batch = self.batch
        return rows[batch.response_ids, batch.position_ids[0, batch.logit_positions]].float()

    def alone(self) -> Tensor:
        """What `hidden` gives of the exact model, each row computed by itself."""
        batch = self.batch
        ids, mask = padded(batch.input_ids, batch.lengths)
        found = []
        for number, row in enumerate(ids):
            mine = row[mask[number].bool()][None]
            states = self.exact.base_model(input_ids=mine, use_cache=False).last_hidden_state[0]
            found.append(states[batch.position_ids[0, batch.logit_positions[batch.response_ids == number]]])
        return torch.cat(found).float()

    def of_trees(self, run: Callable[..., Tensor]) -> Tensor:
        """The same from `run(model, input_ids, position_ids, layout) -> (N, H)`."""
        batch = self.batch
        with self._autocast(self.plain):
            return run(self.plain, batch.input_ids, batch.position_ids, batch.layout)[batch.logit_positions].float()

    def _autocast(self, model: Any) -> Any:
        dtype = self.compute.autocast
        enabled = dtype is not None and model is self.plain
        return torch.autocast(self.compute.device.type, dtype or torch.bfloat16, enabled=enabled)


class NoCopyError(Exception):
    """A model of which no small copy can be made, so that nothing can be tried; says why."""


def small_copies(config: Any, compute: Compute, dtype: torch.dtype, remote_code: bool = False) -> Copies:
    """Small random copies of the model that `config` describes.

    Args:
        config: Of a causal LM or a backbone.
        compute: Of the run.
        dtype: Of the run's weights.
        remote_code: Whether code that comes with the model may run.

    Raises:
        NoCopyError: It can't be made small.
    """
    failure: Exception | None = None
    with torch.device("cpu"), torch.random.fork_rng():  # whatever device Lightning has made the default
        for shrink in (narrow, lambda config: config):
            try:
                small = shrink(small_config(config, _kinds))
                _check_size(small, remote_code)
                return _copies(small, compute, compute.weights_dtype(dtype), remote_code)
            except FAILURES as error:
                failure = failure or error
    line = str(failure).strip().splitlines()[0] if str(failure).strip() else ""
    raise NoCopyError(f"{type(failure).__name__}: {line}") from failure


def _check_size(config: Any, remote_code: bool) -> None:
    """Raise ValueError where a copy would be as large as a real model."""
    from rlhf_pl.models.policy import meta_lm

    model = meta_lm(config, remote_code)
    if (size := sum(p.numel() for p in model.parameters())) > MOST_PARAMETERS:
        raise ValueError(f"the smallest has {size / 1e6:.0f} million parameters")


@torch.no_grad()
def _copies(config: Any, compute: Compute, dtype: torch.dtype, remote_code: bool) -> Copies:
    from transformers import AutoModelForCausalLM

    made = []
    for kind in (torch.float32, dtype):
        torch.manual_seed(0)  # what `make_peaked` adds to, such as sinks, is random too
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=remote_code
        )
        make_peaked(model)
        for parameter in model.parameters():  # both compute with numbers that the run's dtype holds
            parameter.copy_(parameter.to(dtype))
            parameter.data = parameter.to(kind)
        made.append(model.to(compute.device).eval())
    draw, top = torch.Generator().manual_seed(0), config.get_text_config().vocab_size
    prompt, *answers = (torch.randint(3, top, (n,), generator=draw).tolist() for n in (9, 3, 4, 5, 2, 14))
    trees = [
        PrefixGroup(prompt, tuple(answers[:3])),
        PrefixGroup(prompt[:1], (answers[3],)),
        PrefixGroup(prompt[:2], (answers[4],)),
    ]
    for model in made:
        steady_rotary(model, config, max(len(tree.prompt) + max(map(len, tree.answers)) for tree in trees))
    copies = Copies(made[0], made[1], compute, pack(trees).to(compute.device))
    copies.hidden(made[0])  # it must run
    return copies


def _kinds(model: nn.Module) -> list[Any]:
    """What tells the layers of a model apart: classes, shapes and plain attributes of their parts."""
    from rlhf_pl.models.policy import decoder_layers

    def describe(layer: nn.Module) -> Any:
        parts = []
        for name, module in layer.named_modules():
            plain = {
                k: v for k, v in vars(module).items() if isinstance(v, str | bool | int | float) and "idx" not in k
            }
            shapes = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
            parts.append((name, type(module).__name__, repr(sorted(plain.items())), repr(sorted(shapes.items()))))
        return tuple(parts)

    return [describe(layer) for layer in decoder_layers(model)]


def is_as_exact(found: Tensor, plain: Tensor, exact: Tensor) -> bool:
    """Whether `found` is about as near to `exact` as `plain` is, by the mean relative error of a row, shape (M, H)."""
    size = exact.norm(dim=-1).clamp(min=1e-9)
    error, allowed = (((values - exact).norm(dim=-1) / size).mean().item() for values in (found, plain))
    return error <= TIMES_PLAIN * allowed + FLOOR


def once(config: Any, compute: Compute, dtype: torch.dtype, what: str, check: Callable[[], Any]) -> Any:
    """What `check` gives, found once for a config, a device and a dtype."""
    key = (json.dumps(config.to_dict(), sort_keys=True, default=str), str(compute), str(dtype), what)
    if key not in _done:
        _done[key] = check()
    return _done[key]
