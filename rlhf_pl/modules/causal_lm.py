"""Base of the modules that train a causal LM: how it is checked, loaded and wrapped."""

from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rlhf_pl.distributed.weight_placement import reads_weights
from rlhf_pl.models.compute import get_compute
from rlhf_pl.models.lora import LoRA, add_lora, base_dtype
from rlhf_pl.models.policy import DType, PolicyLM, check_lm, empty_lm, load_lm
from rlhf_pl.models.rotary import longest_row
from rlhf_pl.models.source import ModelSource
from rlhf_pl.modules.base import TrainedModule
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.seed import run_seed


class CausalLMModule(TrainedModule):
    """A module that trains a causal LM by the log-probs of given tokens.

    Args:
        source: Where the model comes from.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimizer; it steps once an update.
        lora: Low-rank adapters to train instead of the weights; None to train all weights.
        dtype: Dtype of the trained weights.
        attn_implementation: Attention of transformers.
        use_liger_kernel: Whether liger-kernel computes norms, MLPs and rotary embeddings; None to use it where it can.
        gradient_checkpointing: Whether activations are recomputed in the backward pass.
        logprob_chunk_tokens: Response tokens whose logits are in memory at a time.
    """

    def __init__(
        self,
        source: ModelSource,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable,
        lora: LoRA | None,
        dtype: DType,
        attn_implementation: str,
        use_liger_kernel: bool | None,
        gradient_checkpointing: bool,
        logprob_chunk_tokens: int,
        reset_optimizer: bool = False,
    ) -> None:
        if logprob_chunk_tokens < 1:
            raise InputError(f"`model.logprob_chunk_tokens` must be 1 or more, got {logprob_chunk_tokens}.")
        super().__init__(
            source,
            optimizer,
            lr_scheduler,
            lora,
            dtype,
            attn_implementation,
            use_liger_kernel,
            gradient_checkpointing,
            reset_optimizer,
        )
        self.strict_loading = base_dtype(lora) is None  # a 4-bit base is not in checkpoints
        self.logprob_chunk_tokens = logprob_chunk_tokens
        self.policy: PolicyLM | None = None

    @property
    def hf_model(self) -> Any:
        return None if self.policy is None else self.policy.lm

    def check_source(self) -> None:
        check_lm(self.source)

    def empty_model(self) -> Any:
        return empty_lm(self.source)

    def load_model(self) -> Any:
        return self.build_lm(reads_weights(self._trainer))

    def configure_model(self) -> None:
        """Load the policy. Lightning calls it after all inputs are checked."""
        if self.policy is None:
            self.policy = self.load_unit(from_first_rank=base_dtype(self.lora) is None)

    def build_lm(self, read_weights: bool = True) -> Any:
        """Make the run's starting policy, adapters included; on the meta device if its weights are not read."""
        lm = self.load(self.source, base_dtype(self.lora), read_weights)
        if self.lora is not None:
            add_lora(lm, self.lora, run_seed(), train_head=False)
        return lm

    def load(self, source: ModelSource, base_dtype: str | None = None, read_weights: bool = True) -> Any:
        """Load a causal LM with this run's dtype and kernels."""
        compute, liger = get_compute(self._trainer), self.use_liger_kernel
        longest = longest_row(self._trainer, source.config)
        attention = self.attn_implementation
        return load_lm(source, self.dtype_name, attention, base_dtype, compute, liger, read_weights, longest)

    def unit(self, lm: Any) -> PolicyLM:
        """Wrap a causal LM into a module that computes log-probs in this run's precision."""
        return PolicyLM(lm, self.logprob_chunk_tokens, get_compute(self._trainer))

    def forward(self, **inputs: Any) -> Tensor:
        """Log-probs from `PolicyLM.forward`, called through the strategy's wrapper of this module."""
        assert self.policy is not None
        return self.policy(**inputs)
