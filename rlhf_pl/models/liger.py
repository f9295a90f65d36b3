"""liger-kernel's norms, MLPs and rotary embeddings, bound to one model and to nothing else of the process."""

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
from rlhf_pl.models.kernel_check import is_as_exact, once, small_copies
from rlhf_pl.models.quantization import is_quantized
from rlhf_pl.utils.console import note
from rlhf_pl.utils.errors import InputError

_ROPE = "apply_rotary_pos_emb"


def apply_liger(lm: Any, compute: Compute, wanted: bool | None, option: str = "model.policy") -> bool:
    """Have liger-kernel compute a model's norms, MLPs and rotary embeddings, if a small copy then gives the same.

    Args:
        lm: A Hugging Face model; changed in place.
        compute: Where and how it will compute.
        wanted: True to require it, False to leave it; None for wherever a GPU, the package and its kernels for the
            architecture are there.
        option: The option that names the model, for errors.

    Returns:
        Whether it does.

    Raises:
        InputError: It is required, and can't be had.
    """
    if wanted is False:
        return False
    missing = _what_is_missing(lm, compute)
    if missing is None:
        missing = once(lm.config, compute, lm.dtype, "liger", lambda: _what_fails(lm, compute))
    if missing is None:
        _bind(lm)
        return True
    if wanted:
        group = option.rpartition(".")[0]
        raise InputError(
            f"`{group}.use_liger_kernel` is true, but liger-kernel can't compute {type(lm).__name__}: {missing}. Set "
            "it to null or false."
        )
    if compute.device.type == "cuda":
        _say_plain(type(lm).__name__, missing)
    return False


def _what_is_missing(lm: Any, compute: Compute) -> str | None:
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
    """liger's own function for the architecture, which patches the instance, with what it does to modules undone.

    It replaces the rotary function in the module where the attention is defined. Attention layers of this model get a
    `forward` of their own that sees liger's instead.
    """
    apply = _apply_function(lm.config.model_type)
    wanted = {"rope": True, "rms_norm": True, "layer_norm": True, "swiglu": True, "geglu": True, "cross_entropy": False}
    wanted["fused_linear_cross_entropy"] = False
    with _modules_kept() as changed:
        apply(model=lm, **{k: v for k, v in wanted.items() if k in inspect.signature(apply).parameters})
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
def _modules_kept() -> Iterator[dict[tuple[str, str], Any]]:
    """Undo at the end what happens to the names in transformers' model modules; gives what they were bound to."""
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


def _what_fails(lm: Any, compute: Compute) -> str | None:
    """None if states and their gradient by the embeddings are as exact as those of plain layers."""
    try:
        copies = small_copies(lm.config, compute, lm.dtype)
        exact, plain = (_states_and_gradient(copies, model) for model in (copies.exact, copies.plain))
        _bind(copies.plain)
        found = _states_and_gradient(copies, copies.plain)
    except Exception as error:  # a compiler's or a driver's too
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'it fails'}"
    exact_enough = all(is_as_exact(*parts) for parts in zip(found, plain, exact, strict=True))
    return None if exact_enough else "its results differ from plain layers here"


def _states_and_gradient(copies: Any, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        states = copies.hidden(model)
        factors = torch.linspace(-1, 2, states.numel(), device=states.device).view_as(states)
        embedding = model.get_input_embeddings().weight.requires_grad_()
        (gradient,) = torch.autograd.grad((states * factors).sum(), embedding)
    return states.detach(), gradient.float()[copies.batch.input_ids.unique()]


@cache
@rank_zero_only
def _say_plain(name: str, why: str) -> None:
    note(f"{name} computes without liger-kernel: {why}.")
