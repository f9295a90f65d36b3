"""Supervised fine-tuning as a LightningModule."""

import math
from collections.abc import Mapping

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rlhf_pl.data.sft_batches import SFTBatch
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.models.lora import LoRA
from rlhf_pl.models.policy import DType
from rlhf_pl.models.source import ModelSource
from rlhf_pl.modules.causal_lm import CausalLMModule
from rlhf_pl.modules.logging import is_update, log_update
from rlhf_pl.modules.optimizers import AdamW, WarmupCosine


class SFTModule(CausalLMModule):
    """A policy that learns to give the data's responses: cross-entropy over the assistant's tokens, or those of
    `data.loss_on`.

    Args:
        policy: The model to tune: a folder in Hugging Face format, or a Hub id.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimizer; it steps once an update.
        lora: Train low-rank adapters instead of all weights; they are merged in the export.
        dtype: Dtype of the trained weights. bfloat16 halves their memory, but small updates are lost in it.
        attn_implementation: Attention of transformers: sdpa, eager, flash_attention_2, flex_attention.
        use_liger_kernel: Compute norms, MLPs and rotary embeddings with liger-kernel: less memory and time on GPUs.
            null to use it wherever a GPU, the package and kernels for the architecture are available and agree with
            the plain layers; true to require it (an error without a GPU).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        logprob_chunk_tokens: Response tokens whose logits are in memory at a time.
        chat_template: A Jinja file that replaces the tokenizer's chat template.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Run Python code that comes with the model. Off unless you trust its authors.
    """

    batch_type = SFTBatch
    stage = "sft"
    train_metrics = tuple(f"train/{name}" for name in ("lr", "loss"))
    val_metrics = tuple(f"val/{name}" for name in ("loss", "perplexity"))

    def __init__(
        self,
        policy: str,
        optimizer: OptimizerCallable = lambda p: AdamW(p),
        lr_scheduler: LRSchedulerCallable = lambda o: WarmupCosine(o, warmup=0.1),
        lora: LoRA | None = None,
        dtype: DType = "float32",
        attn_implementation: str = "sdpa",
        use_liger_kernel: bool | None = None,
        gradient_checkpointing: bool = False,
        logprob_chunk_tokens: int = 1024,
        chat_template: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(
            ModelSource(policy, revision, chat_template, trust_remote_code),
            optimizer,
            lr_scheduler,
            lora,
            dtype,
            attn_implementation,
            use_liger_kernel,
            gradient_checkpointing,
            logprob_chunk_tokens,
        )

    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        loss, tokens = self._loss(batch)
        if batch.weight > 0:
            self.train_means.add(weights=float(tokens), loss=loss.detach())
        if is_update(self.trainer, batch_idx):
            log_update(self, self.train_means.compute_and_reset("train", ranks_of(self.trainer)))
        return loss * batch.weight

    def validation_step(self, batch: SFTBatch, batch_idx: int) -> None:
        loss, tokens = self._loss(batch)
        if batch.weight > 0:
            self.val_means.add(weights=float(tokens), loss=loss)

    def _loss(self, batch: SFTBatch) -> tuple[Tensor, int]:
        """Mean negative log-prob of the target tokens, nats, and their number."""
        tokens = len(batch.rows.targets)
        return -self(**batch.rows.inputs()).sum() / max(1, tokens), tokens

    def on_validation_epoch_end(self) -> None:
        metrics = self.val_means.compute_and_reset("val", ranks_of(self.trainer))
        metrics["val/perplexity"] = math.exp(min(metrics["val/loss"], 700.0))
        self.log_dict(metrics)

    def describe_epoch(self, metrics: Mapping[str, float], held_out: int) -> str:
        """The held-out metrics of an epoch, in a line."""
        return (
            f"held-out perplexity {metrics['val/perplexity']:.3f} (loss {metrics['val/loss']:.3f} nats a token, "
            f"{held_out} conversations)"
        )
