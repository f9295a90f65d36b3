"""REBEL as a LightningModule."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric

from rlhf_pl.data.pairs import PairBatch
from rlhf_pl.data.rounds import rounds_done
from rlhf_pl.errors import InputError
from rlhf_pl.fingerprints import describe
from rlhf_pl.losses import PairwiseLoss, RebelLoss
from rlhf_pl.optim import AdamW, WarmupCosine, hyperparameters, restore_hyperparameters
from rlhf_pl.policy import DType, PolicyLM, PolicySource, load_lm


class RebelModule(L.LightningModule):
    """A policy that learns from pairs: REBEL by default, any `PairwiseLoss` by choice.

    Args:
        policy: The model to improve: a folder in Hugging Face format, or a Hub id.
        loss: The loss on pairs.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimizer; it steps once an update.
        kl_coef: Weight of the KL penalty to the fixed reference, in reward units per nat. At 0 no reference is loaded.
        reference: The fixed reference of the KL penalty; null for the policy as it was before training.
        dtype: Dtype of the trained weights. bfloat16 halves their memory, but small updates are lost in it.
        attn_implementation: Attention of transformers: sdpa, eager, flash_attention_2, flex_attention.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        logprob_chunk_tokens: Response tokens whose logits are in memory at a time.
        chat_template: A Jinja file that replaces the tokenizer's chat template.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Run Python code that comes with the model. Off unless you trust its authors.
    """

    def __init__(
        self,
        policy: str,
        loss: PairwiseLoss = RebelLoss(),  # noqa: B008 - stateless; the command line shows it as the default
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=3e-7),
        lr_scheduler: LRSchedulerCallable = lambda o: WarmupCosine(o, warmup=0.1),
        kl_coef: float = 0.0,
        reference: str | None = None,
        dtype: DType = "float32",
        attn_implementation: str = "sdpa",
        gradient_checkpointing: bool = False,
        logprob_chunk_tokens: int = 1024,
        chat_template: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if kl_coef < 0:
            raise InputError(f"`model.kl_coef` must be 0 or more, got {kl_coef}.")
        if reference is not None and kl_coef == 0:
            raise InputError(
                f"`model.reference` is {reference!r} but `model.kl_coef` is 0, so it would have no effect."
            )
        if logprob_chunk_tokens < 1:
            raise InputError(f"`model.logprob_chunk_tokens` must be 1 or more, got {logprob_chunk_tokens}.")
        self.source = PolicySource(policy, revision, chat_template, trust_remote_code)
        self.reference_source = (
            self.source if reference is None else PolicySource(reference, None, None, trust_remote_code)
        )
        self.loss = loss
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.kl_coef = kl_coef
        self.dtype_name: DType = dtype
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.logprob_chunk_tokens = logprob_chunk_tokens
        self.policy: PolicyLM | None = None
        self.train_means: dict[str, MeanMetric] = {}
        self.val_means: dict[str, MeanMetric] = {}
        self.round_loss = MeanMetric()
        self.last_kl: float | None = None
        self._hyperparameters: list[dict[str, Any]] = []

    def setup(self, stage: str) -> None:
        if "true" in str(self.trainer.precision) and self.trainer.precision != "32-true":
            raise InputError(
                f"`trainer.precision`: {self.trainer.precision!r} casts positions and log-probs too, which moves a "
                "sequence's log-prob by nats. For half-precision weights use `--trainer.precision 32-true` with "
                "`--model.dtype bfloat16`; for half-precision compute on float32 weights use `bf16-mixed`."
            )

        check_ready = getattr(getattr(self.trainer, "datamodule", None), "check_ready", None)
        if check_ready is not None:
            check_ready()

    def configure_model(self) -> None:
        """Load the policy. Lightning calls it after all inputs have been checked."""
        if self.policy is not None:
            return
        lm = load_lm(self.source, self.dtype_name, self.attn_implementation)
        if self.gradient_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        self.policy = PolicyLM(lm, self.logprob_chunk_tokens).train()

    def load_reference(self) -> PolicyLM:
        """The fixed reference of the KL penalty, frozen, on this module's device. The caller drops it after use."""
        lm = load_lm(self.reference_source, self.dtype_name, self.attn_implementation).to(self.device)
        return PolicyLM(lm, self.logprob_chunk_tokens).requires_grad_(False).eval()

    def hf_state_dict(self) -> Mapping[str, Tensor]:
        """The policy's weights under their Hugging Face names, tied ones included."""
        assert self.policy is not None
        return self.policy.lm.state_dict()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor, temperature: float) -> Tensor:
        """`PolicyLM.forward` through whatever the strategy wrapped around this module."""
        assert self.policy is not None
        return self.policy(input_ids, attention_mask, response_mask, temperature)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        losses, parts = self._losses(batch)
        self._add_means(self.train_means, "train", losses, parts)
        self.round_loss.update(losses.detach())
        last = batch_idx + 1 == self.trainer.num_training_batches
        if last or (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:  # an update: log over all its pairs
            metrics = self._take_means(self.train_means)
            metrics["train/lr"] = torch.tensor(self.trainer.optimizers[0].param_groups[0]["lr"])
            self.last_kl = float(metrics["train/kl"])
            # Lightning would log after `on_train_batch_end`, and a checkpoint written there would be ahead of the logs
            self.log_dict(metrics, on_step=True, on_epoch=False, logger=False)
            every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
            if every > 0 and (self.trainer.global_step + 1) % every == 0:
                plain = {name: float(value) for name, value in metrics.items()}
                for logger in self.trainer.loggers:
                    logger.log_metrics(plain, step=self.trainer.global_step)
        return losses.mean() * batch.weight

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        self._add_means(self.val_means, "val", *self._losses(batch))

    def _losses(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss per pair, and what is logged about it, each of shape (B,)."""
        rows = batch.rows
        token_logps = self(rows.input_ids, rows.attention_mask, rows.response_mask, batch.temperature)
        logps = token_logps.sum(-1).view(2, -1)
        logratios = logps - batch.old_logps
        rewards = batch.rewards
        if self.kl_coef > 0:
            if batch.reference_logps is None:
                raise InputError(
                    f"`model.kl_coef` is {self.kl_coef}, but this round was prepared without reference log-probs."
                )
            rewards = rewards - self.kl_coef * (batch.old_logps - batch.reference_logps)
        margins = rewards[0] - rewards[1]
        losses = self.loss(logratios[0], logratios[1], margins)
        detached = logratios.detach()
        ratios = detached.exp()
        parts = {
            "kl": -detached.mean(0),
            "kl_chosen": -detached[0],
            "kl_rejected": -detached[1],
            "ratio_mean": ratios.mean(0),
            "ratio_var": ratios.var(0, unbiased=False),
            "logratio_margin": detached[0] - detached[1],
            "reward_margin": margins,
            "sign_align": ((detached[0] - detached[1]).sign() == margins.sign()).float(),
        }
        return losses, parts

    def _add_means(self, means: dict[str, MeanMetric], prefix: str, losses: Tensor, parts: dict[str, Tensor]) -> None:
        """Average over everything since the last `_log_means`, and over ranks."""
        for name, values in {"loss": losses.detach(), **parts}.items():
            key = f"{prefix}/{name}"
            if key not in means:
                means[key] = MeanMetric().to(self.device)
            means[key].update(values)

    @staticmethod
    def _take_means(means: dict[str, MeanMetric]) -> dict[str, Tensor]:
        """The averages, which begin anew."""
        taken = {key: metric.compute() for key, metric in means.items()}
        for metric in means.values():
            metric.reset()
        return taken

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self._take_means(self.val_means))

    def round_summary(self) -> dict[str, float | None]:
        """Mean loss over the round's pairs and the KL of its last update; None for a round without updates."""
        trained = float(self.round_loss.weight) > 0
        return {"loss": float(self.round_loss.compute()) if trained else None, "kl": self.last_kl if trained else None}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        summed = [float(self.round_loss.mean_value), float(self.round_loss.weight)]
        checkpoint["rlhf_pl"] = {"round_loss": summed, "last_kl": self.last_kl}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_weights(checkpoint["state_dict"])
        kept = checkpoint.get("rlhf_pl")
        if kept is not None:
            mean_value, weight = kept["round_loss"]
            self.round_loss.mean_value = torch.tensor(mean_value, device=self.round_loss.device)
            self.round_loss.weight = torch.tensor(weight, device=self.round_loss.device)
            self.last_kl = kept["last_kl"]

    def _check_weights(self, weights: Mapping[str, Tensor]) -> None:
        """The checkpoint's weights must be those of this architecture.

        Raises:
            InputError: Names or shapes differ.
        """
        if self.policy is None:
            return
        own, given = self.state_dict(), weights
        wrong = [n for n in [*own, *given] if n not in own or n not in given or own[n].shape != given[n].shape]
        if wrong:
            raise InputError(
                f"The checkpoint is of another model than `model.policy` ({self.source.path!r}): {wrong[0]!r} and "
                f"{len(set(wrong)) - 1} more tensors do not fit. Give the run a directory of its own "
                "(--trainer.default_root_dir DIR)."
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer, scheduler = self._make_optimizer([p for p in self.parameters() if p.requires_grad])
        if isinstance(scheduler, WarmupCosine):
            scheduler.follow(self._progress)
        self._hyperparameters = hyperparameters(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _make_optimizer(self, parameters: list[torch.nn.Parameter]) -> tuple[torch.optim.Optimizer, Any]:
        try:
            optimizer = self.optimizer(parameters)
        except (ValueError, TypeError) as error:
            raise InputError(f"`model.optimizer` can't be made: {error}") from error
        try:
            return optimizer, self.lr_scheduler(optimizer)
        except (ValueError, TypeError) as error:
            raise InputError(f"`model.lr_scheduler` can't be made: {error}") from error

    def training_settings(self) -> dict[str, Any]:
        """What the training on a round depends on, without building anything heavy."""
        optimizer, scheduler = self._make_optimizer([torch.nn.Parameter(torch.zeros(1))])
        return {
            "loss": describe(self.loss),
            "optimizer": {"class": type(optimizer).__qualname__, **optimizer.defaults},
            "lr_scheduler": describe(scheduler, "base_lrs", "last_epoch"),
            "kl_coef": self.kl_coef,
            "dtype": self.dtype_name,
        }

    def on_train_start(self) -> None:
        """A checkpoint brings the hyper-parameters it was written with; those of the config count."""
        for optimizer, scheduler in zip(self.trainer.optimizers, self.trainer.lr_scheduler_configs, strict=False):
            restore_hyperparameters(optimizer, scheduler.scheduler, self._hyperparameters)

    def on_train_epoch_start(self) -> None:
        self.round_loss.reset()

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        """A round's first rate: only now is it known how many updates the round has."""
        if batch_idx > 0:
            return
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, WarmupCosine):
                config.scheduler.refresh()

    def _progress(self) -> tuple[float, float]:
        """Middle of the next update's slice, as a share of the run and of its round."""
        trainer = self.trainer
        batches = trainer.num_training_batches
        if batches in (0, float("inf")):  # no loader yet
            return 0.0, 0.0
        batch_progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        updates = -(-int(batches) // trainer.accumulate_grad_batches)
        done = -(-batch_progress.processed // trainer.accumulate_grad_batches)
        finished, done = rounds_done(trainer) + done // updates, done % updates
        of_round = (done + 0.5) / updates
        shares = []
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            shares.append((finished + of_round) / trainer.max_epochs)
        if trainer.max_steps > 0:
            shares.append((trainer.global_step + 0.5) / trainer.max_steps)
        return max(shares, default=of_round), of_round

    def export(self, folder: str, dtype: str | None = None) -> None:
        """Write the policy as a Hugging Face folder: safetensors, tokenizer, chat template, generation config.

        Args:
            folder: Where to; made if missing.
            dtype: Dtype of the weights; None for that of the model the run started from.
        """
        assert self.policy is not None
        lm = self.policy.lm
        target = getattr(torch, dtype) if dtype else self.source.config.dtype or torch.float32
        weights = {name: tensor.detach().cpu().to(target).clone() for name, tensor in self.hf_state_dict().items()}
        config = lm.config
        try:
            lm.config = deepcopy(self.source.config)  # ours has dropout off
            lm.config.dtype = target
            lm.generation_config = self.source.generation_config
            lm.save_pretrained(folder, state_dict=weights)
        finally:
            lm.config = config
        self.source.tokenizer.save_pretrained(folder)
