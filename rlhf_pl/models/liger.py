"""liger-kernel's norms, MLPs and rotary embeddings, bound to one model without changing the rest of the process."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from types import FunctionType, MethodType
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from rlhf_pl.models.compute import Compute
from rlhf_pl.models.kernel_check import cached_check, is_as_exact, small_copies
from rlhf_pl.models.quantization import is_quantized
from rlhf_pl.utils.console import note
from rlhf_pl.utils.errors import InputError, describe_error

_ROPE = "apply_rotary_pos_emb"


def apply_liger(lm: Any, compute: Compute, required: bool | None, option: str = "model.policy") -> bool:
    """Make liger-kernel compute a model's norms, MLPs and rotary embeddings, if a small copy gives the same results.

    Args:
        lm: A Hugging Face model; changed in place.
        compute: Device and dtypes of the computation.
        required: True to require liger-kernel, False to disable it; None to use it if there are a GPU, the package and
            its kernels for the architecture.
        option: The option that names the model, for errors.

    Returns:
        Whether the model uses liger-kernel.

    Raises:
        InputError: liger-kernel is required, but can't be used.
    """
    if required is False:
        return False
    missing = _find_missing(lm, compute)
    if missing is None:
        missing = cached_check(lm.config, compute, lm.dtype, "liger", lambda: _find_failure(lm, compute))
    if missing is None:
        _bind(lm)
        return True
    if required:
        group = option.rpartition(".")[0]
        raise InputError(
            f"`{group}.use_liger_kernel` is true, but liger-kernel can't compute {type(lm).__name__}: {missing}. Set "
            "it to null or false."
        )
    if compute.device.type == "cuda":
        _note_not_used(type(lm).__name__, missing)
    return False


def _find_missing(lm: Any, compute: Compute) -> str | None:
    import os

    if compute.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no GPU"
    if find_spec("liger_kernel") is None:
        return "the package is not installed (pip install 'rlhf-pl[liger]')"
    if is_quantized(lm):
        return "its weights are quantized"
    if _apply_function(lm.config.model_type) is None:
        return "it has no kernels for this architecture"
    return None


def _apply_function(model_type: str) -> Any:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)


def _bind(lm: Any) -> None:
    """Patch one model with liger's function for its architecture, and undo what it changes in Python modules.

    liger replaces the rotary function in the Python module that defines the attention. Instead, the attention layers of
    this model get their own `forward`, which sees liger's rotary function.
    """
    apply = _apply_function(lm.config.model_type)
    required = {
        "rope": True,
        "rms_norm": True,
        "layer_norm": True,
        "swiglu": True,
        "geglu": True,
        "cross_entropy": False,
    }
    required["fused_linear_cross_entropy"] = False
    with _restore_modules() as changed:
        apply(model=lm, **{k: v for k, v in required.items() if k in inspect.signature(apply).parameters})
    for module in lm.modules():
        rope = changed.get((type(module).__module__, _ROPE))
        forward = type(module).forward
        if rope is not None and isinstance(forward, FunctionType) and _ROPE in forward.__code__.co_names:
            own = FunctionType(
                forward.__code__,
                forward.__globals__ | {_ROPE: rope},
                forward.__name__,
                forward.__defaults__,
                forward.__closure__,
            )
            own.__kwdefaults__ = forward.__kwdefaults__
            module.forward = MethodType(own, module)


@contextmanager
def _restore_modules() -> Iterator[dict[tuple[str, str], Any]]:
    """Restore names in transformers' model modules on exit; yields a dict that then holds their new values."""
    changed: dict[tuple[str, str], Any] = {}
    modules = {n: m for n, m in sys.modules.items() if n.startswith("transformers.models.") and ".modeling_" in n}
    before = {name: dict(vars(module)) for name, module in modules.items()}
    classes = {
        value: dict(vars(value))
        for names in before.values()
        for value in names.values()
        if isinstance(value, type) and value.__module__.startswith("transformers.models.")
    }
    try:
        yield changed
    finally:
        for name, module in modules.items():
            for key, value in list(vars(module).items()):
                if before[name].get(key) is not value and key in before[name]:
                    changed[name, key] = value
                    setattr(module, key, before[name][key])
        for kind, names in classes.items():
            for key in ("forward", "__init__"):
                if key in names and vars(kind).get(key) is not names[key]:
                    setattr(kind, key, names[key])


def _find_failure(lm: Any, compute: Compute) -> str | None:
    """Compare hidden states and the gradient of the embeddings to plain layers; None if they are as exact."""
    try:
        copies = small_copies(lm.config, compute, lm.dtype)
        exact, plain = (_states_and_gradient(copies, model) for model in (copies.exact, copies.plain))
        _bind(copies.plain)
        found = _states_and_gradient(copies, copies.plain)
    except Exception as error:  # compilers and drivers raise errors of any class
        return describe_error(error)
    exact_enough = all(is_as_exact(*parts) for parts in zip(found, plain, exact, strict=True))
    return None if exact_enough else "its results differ from those of plain layers"


def _states_and_gradient(copies: Any, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        states = copies.hidden(model)
        factors = torch.linspace(-1, 2, states.numel(), device=states.device).view_as(states)
        embedding = model.get_input_embeddings().weight.requires_grad_()
        (gradient,) = torch.autograd.grad((states * factors).sum(), embedding)
    return states.detach(), gradient.float()[copies.batch.input_ids.unique()]


@cache
@rank_zero_only
def _note_not_used(name: str, why: str) -> None:
    note(f"{name} computes without liger-kernel: {why}.")
