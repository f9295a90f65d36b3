"""Checks that fast paths give the same results as plain layers, on a small random copy, as the run computes."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pl.models.compute import Compute
from rlhf_pl.models.packed_batch import PackedBatch, PrefixGroup, pack, unpack
from rlhf_pl.models.rotary import stabilize_rotary
from rlhf_pl.models.small_copy import make_peaked, narrow, small_config
from rlhf_pl.utils.errors import describe_error

# rounding allowance: the largest error of a fast path against float32, relative to plain layers in the same dtype
MAX_ERROR_RATIO = 2.0
ERROR_FLOOR = 2e-5  # relative error that is always allowed
MAX_PARAMETERS = 250_000_000

# errors of a model that does not support what it is given
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
_results: dict[tuple[str, ...], Any] = {}


@dataclass(frozen=True)
class Copies:
    """A small random model twice, both with eager attention.

    Args:
        exact: Computes in float32.
        plain: The same weights in the run's dtype; the fast path under test is applied to it.
        compute: Device and dtypes.
        batch: Prefix groups, longer than the models' windows.
    """

    exact: Any
    plain: Any
    compute: Compute
    batch: PackedBatch

    def hidden(self, model: Any) -> Tensor:
        """Hidden states of the backbone that predict the targets, from padded rows, shape (M, H), float32."""
        ids, mask = unpack(self.batch.input_ids, self.batch.lengths)
        with self._autocast(model):
            rows = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        batch = self.batch
        return rows[batch.response_ids, batch.position_ids[0, batch.logit_positions]].float()

    def hidden_alone(self) -> Tensor:
        """Like `hidden` of the exact model, with each row computed alone."""
        batch = self.batch
        ids, mask = unpack(batch.input_ids, batch.lengths)
        found = []
        for i, row in enumerate(ids):
            tokens = row[mask[i].bool()][None]
            states = self.exact.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
            found.append(states[batch.position_ids[0, batch.logit_positions[batch.response_ids == i]]])
        return torch.cat(found).float()

    def hidden_packed(self, run: Callable[..., Tensor]) -> Tensor:
        """Like `hidden` of the plain model, from `run(model, input_ids, position_ids, layout) -> (N, H)`."""
        batch = self.batch
        with self._autocast(self.plain):
            return run(self.plain, batch.input_ids, batch.position_ids, batch.layout)[batch.logit_positions].float()

    def _autocast(self, model: Any) -> Any:
        dtype = self.compute.autocast
        enabled = dtype is not None and model is self.plain
        return torch.autocast(self.compute.device.type, dtype or torch.bfloat16, enabled=enabled)


class NoCopyError(Exception):
    """A model has no small copy, so that fast paths can't be checked; the message gives the reason."""


def small_copies(config: Any, compute: Compute, dtype: torch.dtype, remote_code: bool = False) -> Copies:
    """Make small random copies of the model that `config` describes.

    Args:
        config: Config of a causal LM or a backbone.
        compute: Device and dtypes of the run.
        dtype: Dtype of the run's weights.
        remote_code: Whether Python code of the model may run.

    Raises:
        NoCopyError: The model can't be made small.
    """
    failure: Exception | None = None
    with torch.device("cpu"), torch.random.fork_rng():  # Lightning may have set another default device
        for shrink in (narrow, lambda config: config):
            try:
                small = shrink(small_config(config, _describe_layers))
                _check_size(small, remote_code)
                return _copies(small, compute, compute.weights_dtype(dtype), remote_code)
            except FAILURES as error:
                failure = failure or error
    assert failure is not None
    raise NoCopyError(describe_error(failure)) from failure


def _check_size(config: Any, remote_code: bool) -> None:
    """Raise ValueError if a copy would be as large as a real model."""
    from rlhf_pl.models.policy import meta_lm

    model = meta_lm(config, remote_code)
    if (size := sum(p.numel() for p in model.parameters())) > MAX_PARAMETERS:
        raise ValueError(f"the smallest copy has {size / 1e6:.0f} million parameters")


@torch.no_grad()
def _copies(config: Any, compute: Compute, dtype: torch.dtype, remote_code: bool) -> Copies:
    from transformers import AutoModelForCausalLM

    made = []
    for kind in (torch.float32, dtype):
        torch.manual_seed(0)  # `make_peaked` adds to some initial values, for example sinks, which are random
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=remote_code
        )
        make_peaked(model)
        for parameter in model.parameters():  # round both copies' weights to the run's dtype
            parameter.copy_(parameter.to(dtype))
            parameter.data = parameter.to(kind)
        made.append(model.to(compute.device).eval())
    generator, size = torch.Generator().manual_seed(0), config.get_text_config().vocab_size
    prompt, *responses = (torch.randint(3, size, (n,), generator=generator).tolist() for n in (9, 3, 4, 5, 2, 14))
    groups = [
        PrefixGroup(prompt, tuple(responses[:3])),
        PrefixGroup(prompt[:1], (responses[3],)),
        PrefixGroup(prompt[:2], (responses[4],)),
    ]
    for model in made:
        stabilize_rotary(model, config, max(len(group.prompt) + max(map(len, group.responses)) for group in groups))
    copies = Copies(made[0], made[1], compute, pack(groups).to(compute.device))
    copies.hidden(made[0])  # raises if the model does not run
    return copies


def _describe_layers(model: nn.Module) -> list[Any]:
    """Describe each layer of a model by the classes, shapes and plain attributes of its modules."""
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
    """Whether `found` is about as close to `exact` as `plain` is, by the mean relative error per row, shape (M, H)."""
    size = exact.norm(dim=-1).clamp(min=1e-9)
    error, allowed = (((values - exact).norm(dim=-1) / size).mean().item() for values in (found, plain))
    return error <= MAX_ERROR_RATIO * allowed + ERROR_FLOOR


def cached_check(config: Any, compute: Compute, dtype: torch.dtype, name: str, check: Callable[[], Any]) -> Any:
    """The result of `check`, computed once per config, device, dtype and name of the check."""
    key = (json.dumps(config.to_dict(), sort_keys=True, default=str), str(compute), str(dtype), name)
    if key not in _results:
        _results[key] = check()
    return _results[key]
