"""Training of a reward model on comparisons, as a LightningModule."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics.classification import BinaryCalibrationError

from rlhf_pl.algorithms.agreement import wilson_interval
from rlhf_pl.algorithms.losses import bradley_terry_loss, centering_loss
from rlhf_pl.data.preference_batches import PreferenceBatch
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.models.classifier_head import check_new_classifier, empty_classifier, has_head
from rlhf_pl.models.compute import get_compute
from rlhf_pl.models.liger import apply_liger
from rlhf_pl.models.lora import LoRA, add_lora
from rlhf_pl.models.policy import DType
from rlhf_pl.models.rendering import Rendered, Renderer, SystemPrompt, reward_renderer
from rlhf_pl.models.score_position import ScoreAt, warn_if_read_elsewhere, warn_once, write_mean_score, write_score_at
from rlhf_pl.models.sequence_classifier import ClassifierLM, new_classifier
from rlhf_pl.models.source import ModelSource
from rlhf_pl.modules.base import TrainedModule
from rlhf_pl.modules.export import export_folder
from rlhf_pl.modules.logging import is_update, log_update
from rlhf_pl.modules.optimizers import AdamW, WarmupCosine
from rlhf_pl.modules.padding_token import Padding, add_embedding_rows, choose_padding, padding_in_config
from rlhf_pl.modules.score_mean import compute_score_mean
from rlhf_pl.utils.console import console
from rlhf_pl.utils.errors import InputError, check_at_least
from rlhf_pl.utils.fingerprints import rows_fingerprint
from rlhf_pl.utils.seed import run_seed

PAIR_METRICS = ("loss", "accuracy", "margin", "score_chosen", "score_rejected")


class RewardModelModule(TrainedModule):
    """A reward model that learns from comparisons by the Bradley-Terry loss.

    Args:
        backbone: A causal LM, or a classifier, whose head is kept if it has one output: a folder or a Hub id.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimizer; it steps once an update.
        centering: Weight of the squared sum of a pair's scores, which keeps scores near 0.
        lora: Train low-rank adapters and the head instead of all weights; they are merged in the export.
        dtype: Dtype of the trained weights. bfloat16 halves their memory, but small updates are lost in it.
        attn_implementation: Attention of transformers: sdpa, eager, flash_attention_2, flex_attention.
        use_liger_kernel: Compute norms, MLPs and rotary embeddings with liger-kernel: less memory and time on GPUs.
            null to use it wherever a GPU, the package and kernels for the architecture are available and agree with
            the plain layers; true to require it (an error without a GPU).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        system_prompt: `keep` or `drop` system messages.
        pair_encoding: Encode prompt and response as a pair of texts, for encoders without a chat template.
        chat_template: A Jinja file that replaces the tokenizer's chat template.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Run Python code that comes with the model. Off unless you trust its authors.
        score_at: Where the score is read: `last`, the conversation's last token, whatever it is, where every other tool
            reads the exported model too; `eos`, the EOS that the template writes after the response; `before_eos`, the
            token before that. The exported config records it if it is not `last`. null for the value in the backbone's
            config, or `last`.
    """

    batch_type = PreferenceBatch
    stage = "reward_model"
    train_metrics = tuple(f"train/{name}" for name in ("lr", *PAIR_METRICS))
    val_metrics = tuple(f"val/{name}" for name in (*PAIR_METRICS, "longer_accuracy", "calibration_error"))
    exports_adapter = False

    def __init__(
        self,
        backbone: str,
        optimizer: OptimizerCallable = lambda p: AdamW(p),
        lr_scheduler: LRSchedulerCallable = lambda o: WarmupCosine(o, warmup=0.1),
        centering: float = 0.0,
        lora: LoRA | None = None,
        dtype: DType = "float32",
        attn_implementation: str = "sdpa",
        use_liger_kernel: bool | None = None,
        gradient_checkpointing: bool = False,
        system_prompt: SystemPrompt = "keep",
        pair_encoding: bool = False,
        chat_template: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        score_at: ScoreAt | None = None,
    ) -> None:
        check_at_least("model", centering=(centering, 0))
        if lora is not None and lora.base_dtype is not None:
            raise InputError("`model.lora.base_dtype`: reward models train on a base in `model.dtype`. Set it to null.")
        super().__init__(
            ModelSource(backbone, revision, chat_template, trust_remote_code, "model.backbone"),
            optimizer,
            lr_scheduler,
            lora,
            dtype,
            attn_implementation,
            use_liger_kernel,
            gradient_checkpointing,
        )
        self.centering = centering
        self.system_prompt: SystemPrompt = system_prompt
        self.pair_encoding = pair_encoding
        self._score_at = score_at
        self.classifier: ClassifierLM | None = None
        self._margins: list[Tensor] = []  # of held-out pairs that are not ties
        self._compared = 0  # number of these pairs in the last validation

    def renderer(self, max_tokens: int) -> Renderer:
        """Make the renderer of this model's conversations; `ClassifierReward` will render them equally."""
        limit = min(max_tokens, self.source.max_context_tokens)
        tokenizer = self.padding.tokenizer
        return reward_renderer(
            self.source, limit, self.system_prompt, self.pair_encoding, self._score_at, tokenizer=tokenizer
        )

    @cached_property
    def padding(self) -> Padding:
        """The padding token that the model is exported with, and its tokenizer."""
        render = reward_renderer(self.source, 2**31, self.system_prompt, self.pair_encoding, self._score_at)
        return choose_padding(render, self.source.config)

    @property
    def pad_id(self) -> int:
        """The token that rows are padded with."""
        assert self.classifier is not None
        return self.classifier.pad_id or 0

    @property
    def shares_prompts(self) -> bool:
        """Whether the common prefix of a comparison's two rows is computed once."""
        return self.classifier is not None and self.classifier.shares_prompts and not self.pair_encoding

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._warn_where_scores_are_read()

    def _warn_where_scores_are_read(self) -> None:
        render = self.renderer(2**31)
        if render.trailing_tokens:
            warn_once(
                f"`model.score_at` is {render.score_at}: the exported model's config records it for ClassifierReward "
                "and VLLMServerReward; transformers, vLLM and TRL by themselves read the score at a conversation's "
                "last token, as with `last`."
            )
        elif self._score_at is None and has_head(self.source):
            warn_if_read_elsewhere(render, self.source)

    @property
    def hf_model(self) -> Any:
        return None if self.classifier is None else self.classifier.model

    def check_source(self) -> None:
        check_new_classifier(self.source)

    def empty_model(self) -> Any:
        return empty_classifier(self.source)

    def load_model(self) -> Any:
        seed = run_seed()
        model = new_classifier(self.source, seed, getattr(torch, self.dtype_name), self.attn_implementation)
        if self.lora is not None:
            add_lora(model, self.lora, seed, train_head=True)
        return model

    def unit(self, model: Any) -> ClassifierLM:
        compute = get_compute(self._trainer)
        apply_liger(model, compute, self.use_liger_kernel, self.source.option)
        return ClassifierLM(model, compute)

    def configure_model(self) -> None:
        """Load the backbone. Lightning calls it after all inputs are checked."""
        if self.classifier is None:
            self.classifier = self.load_unit()

    def forward(self, **inputs: Any) -> Tensor:
        """Scores of rows or of prefix groups, shape (R,); the arguments are those of `ClassifierLM.forward`."""
        assert self.classifier is not None
        return self.classifier(**inputs)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        losses, parts = self._losses(batch)
        if batch.weight > 0:
            self.train_means.add(**parts)
        if is_update(self.trainer, batch_idx):
            log_update(self, self.train_means.compute_and_reset("train", ranks_of(self.trainer)))
        return losses.mean() * batch.weight

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        _, parts = self._losses(batch)
        if batch.weight > 0:
            is_clear = batch.labels != 0.5
            self.val_means.add(**parts, longer_accuracy=batch.longer[is_clear])
            self._margins.append(parts["margin"][is_clear].cpu())

    def _losses(self, batch: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss per pair and the logged metrics, each of shape (B,)."""
        chosen, rejected = self(**batch.inputs).view(-1, 2).T
        margins = chosen - rejected
        losses = bradley_terry_loss(margins, batch.labels, batch.margins)
        if self.centering > 0:
            losses = losses + self.centering * centering_loss(chosen, rejected)
        margins = margins.detach()
        parts = {
            "loss": losses.detach(),
            "accuracy": 0.5 * (1 + margins.sign())[batch.labels != 0.5],  # equal scores count half
            "margin": margins,
            "score_chosen": chosen.detach(),
            "score_rejected": rejected.detach(),
        }
        return losses, parts

    def on_validation_epoch_end(self) -> None:
        metrics = self.val_means.compute_and_reset("val", ranks_of(self.trainer))
        margins = torch.cat(ranks_of(self.trainer).all_gather(torch.cat([torch.zeros(0), *self._margins])))
        self._margins, self._compared = [], len(margins)
        calibration = BinaryCalibrationError(n_bins=10)
        if len(margins):
            calibration.update(margins.abs().sigmoid(), (margins > 0).int())
        metrics["val/calibration_error"] = float(calibration.compute())
        self.log_dict(metrics)

    def describe_epoch(self, metrics: Mapping[str, float], held_out: int) -> str:
        """The held-out metrics of an epoch, in a line. Accuracy and its interval are of the pairs that are not ties."""
        parts = f"margin {metrics['val/margin']:.3f}, loss {metrics['val/loss']:.3f}"
        if not self._compared:
            return f"held-out {parts} ({held_out} pairs, all of them ties)"
        accuracy, longer = metrics["val/accuracy"], metrics["val/longer_accuracy"]
        low, high = wilson_interval(accuracy, self._compared)
        ties = f" and {held_out - self._compared} ties" if held_out > self._compared else ""
        return (
            f"held-out accuracy {accuracy:.3f} (95%: {low:.3f} to {high:.3f}, {self._compared} pairs{ties}), {parts}, "
            f"calibration error {metrics['val/calibration_error']:.3f}; length alone gets {max(longer, 1 - longer):.3f}"
        )

    @property
    def _data(self) -> Any:
        return getattr(self._trainer, "datamodule", None)

    @property
    def _centering_rows(self) -> list[Rendered]:
        return getattr(self._data, "centering_rows", [])

    def export_settings(self) -> dict[str, Any]:
        """What an export depends on besides the weights."""
        rows = self._centering_rows
        return {"center_on": rows_fingerprint(list(row.ids) for row in rows)} if rows else {}

    @property
    def export_tokenizer(self) -> Any:
        return self.padding.tokenizer

    def export(self, folder: str, dtype: str | None = None) -> None:
        """Write the reward model as a Hugging Face folder that `ClassifierReward` and plain transformers load.

        With `data.center_on`, all ranks score those conversations, and the config records their mean score as `bias`.

        Args:
            folder: The target; made if missing.
            dtype: Dtype of the weights; None for that of the checkpoint that the run started from.
        """
        assert self.classifier is not None
        model, padding = self.classifier.model, self.padding
        write_score_at(model.config, self.renderer(2**31).score_at)
        if self._centering_rows:
            mean = compute_score_mean(self, self._centering_rows, 2 * self._data.batch_size)
            write_mean_score(model.config, mean)
            if self.global_rank == 0:
                text = f"Mean score of the {len(self._centering_rows)} conversations of `data.center_on`: {mean:.4g}"
                console.print(text, soft_wrap=True)
        weights = add_embedding_rows(self.weights(), model, padding.new_rows)
        with padding_in_config(model.config, padding):
            write = self.global_rank == 0
            export_folder(model, self.source, padding.tokenizer, weights, folder, dtype, write)
