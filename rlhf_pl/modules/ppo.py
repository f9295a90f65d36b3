"""PPO: a policy and its critic, trained together, as a LightningModule."""

from contextlib import nullcontext
from functools import cached_property
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rlhf_pl.algorithms.losses import PPOLoss
from rlhf_pl.algorithms.policy_loss import PolicyLoss
from rlhf_pl.algorithms.prompt_groups import OLD_VALUES, VALUES
from rlhf_pl.distributed.gather_weights import Weights, full_tensors, like_of, model_weights
from rlhf_pl.distributed.strategies import get_callable_policy, is_sharded, shard
from rlhf_pl.distributed.weight_placement import checks_weights
from rlhf_pl.models.classifier_head import empty_classifier
from rlhf_pl.models.compute import get_compute
from rlhf_pl.models.critic_options import Critic, record_critic
from rlhf_pl.models.lora import LoRA
from rlhf_pl.models.packed_batch import PackedBatch
from rlhf_pl.models.policy import DType, Outputs, PolicyLM
from rlhf_pl.models.rotary import longest_row
from rlhf_pl.models.source import ModelSource
from rlhf_pl.models.value_head import FOLDER, make_value_head, read_value_head, save_value_head
from rlhf_pl.models.value_model import ValueLM, check_critic, check_critic_lora, load_critic, read_tokenizer
from rlhf_pl.modules.export import export_folder, try_export
from rlhf_pl.modules.optimizers import AdamW, WarmupCosine, add_empty_state
from rlhf_pl.modules.pairwise import RebelModule
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.seed import run_seed

_NOT_OF_CRITICS = ("targets", "temperature")  # inputs of a policy


class PPOModule(RebelModule):
    """A policy that learns from the advantages that a critic estimates, and that critic.

    Both are in one optimizer, as two parameter groups. The critic's values are computed once before a round trains, and
    with every update, where they are in `PromptGroups.stored` of the loss as `values`.

    Args:
        policy: The model to improve: a folder in Hugging Face format, or a Hub id.
        loss: The loss, which reads the values of the critic.
        critic: What computes the values, and how it trains.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimizer; it steps once an update.
        kl_coef: Weight of the KL penalty to the fixed reference, in reward units per nat. At 0 no reference is loaded,
            unless the loss needs one.
        reference: The fixed reference of the KL penalty and the loss; null for the policy before training.
        trainable_layers: Train only this number of the policy's last layers, the final norm and an output head that is
            not tied to the embeddings; null for all weights.
        lora: Train low-rank adapters instead of all weights of the policy. The model without them is the reference of
            `kl_coef`. The sampler gets the merged model; the export has both the merged model and the adapters alone.
        dtype: Dtype of the trained weights. bfloat16 halves their memory, but small updates are lost in it.
        attn_implementation: Attention of transformers: sdpa, eager, flash_attention_2, flex_attention.
        use_liger_kernel: Compute norms, MLPs and rotary embeddings with liger-kernel: less memory and time on GPUs.
            null to use it wherever a GPU, the package and kernels for the architecture are available and agree with
            the plain layers; true to require it (an error without a GPU).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        logprob_chunk_tokens: Response tokens whose logits are in memory at a time.
        chat_template: A Jinja file that replaces the tokenizer's chat template.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Run Python code that comes with the models. Off unless you trust their authors.
        reset_optimizer: Start every round with a new state of the optimizer, for policy and critic, without the
            moments and the number of steps of the rounds before.
    """

    extra_passes: ClassVar[tuple[str, ...]] = (OLD_VALUES,)

    def __init__(
        self,
        policy: str,
        loss: PolicyLoss = PPOLoss(),  # noqa: B008 - stateless; the command line shows it as the default
        critic: Critic = Critic(),  # noqa: B008 - frozen
        optimizer: OptimizerCallable = lambda p: AdamW(p),
        lr_scheduler: LRSchedulerCallable = lambda o: WarmupCosine(o, warmup=0.1),
        kl_coef: float = 0.0,
        reference: str | None = None,
        trainable_layers: int | None = None,
        lora: LoRA | None = None,
        dtype: DType = "float32",
        attn_implementation: str = "sdpa",
        use_liger_kernel: bool | None = None,
        gradient_checkpointing: bool = False,
        logprob_chunk_tokens: int = 1024,
        chat_template: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        reset_optimizer: bool = False,
    ) -> None:
        super().__init__(
            policy,
            loss,
            optimizer,
            lr_scheduler,
            kl_coef,
            reference,
            trainable_layers,
            lora,
            dtype,
            attn_implementation,
            use_liger_kernel,
            gradient_checkpointing,
            logprob_chunk_tokens,
            chat_template,
            revision,
            trust_remote_code,
            reset_optimizer,
        )
        if OLD_VALUES not in self.needs:
            raise InputError(
                f"`model.loss` {type(loss).__name__} reads no values of a critic, so `model.critic` would have no "
                "effect. Train with RebelModule (--model RebelModule), or choose PPOLoss."
            )
        self.critic_options = critic
        self.critic_source = self.source
        if critic.model is not None:
            self.critic_source = ModelSource(critic.model, None, None, trust_remote_code, "model.critic.model")
        self.critic: ValueLM | None = None
        self._critic_like: dict[str, Tensor] = {}
        self.train_metrics = (*self.train_metrics, "train/critic_lr")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        options, source = self.critic_options, self.critic_source
        if options.shares_trunk:
            read_value_head(source, self.empty_model().get_output_embeddings().weight.shape[1])
            return
        longest = getattr(getattr(self.trainer, "datamodule", None), "longest_tokens", None)
        check_critic(source, self.source, longest, checks_weights(self.trainer, source))
        if options.lora is not None:
            check_critic_lora(source, options.lora)

    def add_parts(self, unit: PolicyLM) -> None:
        if self.critic_options.shares_trunk:
            unit.value_head = make_value_head(unit.lm, self.source, run_seed())

    def configure_model(self) -> None:
        """Load the policy and the critic. Lightning calls it after all inputs are checked."""
        super().configure_model()
        if self.critic is not None or self.critic_options.shares_trunk:
            return
        compute, source = get_compute(self._trainer), self.critic_source
        model = load_critic(
            source,
            run_seed(),
            self.critic_options.lora,
            getattr(torch, self.dtype_name),
            self.attn_implementation,
            compute,
            self.use_liger_kernel,
            longest_row(self._trainer, source.config),
        )
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self._critic_like = like_of(model)
        critic = ValueLM(model, compute).train()
        shard(self, critic)
        self.critic = critic

    def forward(self, outputs: Outputs = "logps", **inputs: Any) -> Any:
        """Log-probs from `PolicyLM.forward`, values of the critic, or a tuple of both.

        Called through the strategy's wrapper of this module. The arguments are those of `PolicyLM.forward`.
        """
        assert self.policy is not None
        if outputs == "logps":
            return self.policy(**inputs)
        if self.critic is None:
            return self.policy(**inputs, outputs=outputs)
        values = self.critic(**{name: value for name, value in inputs.items() if name not in _NOT_OF_CRITICS})
        return values if outputs == "values" else (self._logps(**inputs), values)

    def _logps(self, **inputs: Any) -> Tensor:
        """Log-probs; without gradient where only the critic trains and no other rank waits for the policy's."""
        assert self.policy is not None
        is_alone = self.trains_critic_alone and self.trainer.world_size == 1
        with torch.no_grad() if is_alone else nullcontext():
            logps: Tensor = self.policy(**inputs)
        return logps

    def old_values(self, rows: PackedBatch, temperature: float) -> Tensor:
        """Values of the critic as it is, for `extra_passes`; shape (M,). All ranks call it together."""
        values: Tensor = get_callable_policy(self.trainer)(outputs="values", **rows.inputs())
        return values

    def numbers_of_tokens(self, rows: PackedBatch, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        logps, values = self(outputs="both", **rows.inputs(), temperature=temperature)
        return logps, {VALUES: values}

    @property
    def trains_critic_alone(self) -> bool:
        """Whether the update in progress is one of the run's first, which leave the policy as it is."""
        return self.trainer.training and self.trainer.global_step < self.critic_options.warmup_updates

    def _trained(self) -> tuple[list[Any], list[Any]]:
        """The parameters that train: those of the policy, and those of the critic."""
        assert self.policy is not None
        part: Any = self.policy.value_head if self.critic is None else self.critic
        of_critic = {id(parameter) for parameter in part.parameters()}
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [p for p in trained if id(p) not in of_critic], [p for p in trained if id(p) in of_critic]

    def parameters_to_train(self) -> list[Any]:
        policy, critic = self._trained()
        lr = self.critic_options.lr
        return [{"params": policy}, {"params": critic} | ({} if lr is None else {"lr": lr})]

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: int | float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if self.trains_critic_alone:
            policy, _ = self._trained()
            for parameter in policy:
                parameter.grad = None  # optimizers leave such a parameter as it is, its decay and moments included
            if is_sharded(self.trainer):
                add_empty_state(self.trainer.optimizers[0], policy)
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def further_metrics(self) -> dict[str, float]:
        return {"train/critic_lr": self.trainer.optimizers[0].param_groups[1]["lr"]}

    def extra_pass_settings(self) -> dict[str, Any]:
        settings = record_critic(self.critic_options)
        return {"critic": {name: settings[name] for name in ("model", "shares_trunk", "lora")}}

    def training_settings(self) -> dict[str, Any]:
        return super().training_settings() | {"critic": record_critic(self.critic_options)}

    @cached_property
    def _critic_tokenizer(self) -> Any:
        source = self.critic_source
        return source.tokenizer if source is self.source else read_tokenizer(source)

    def critic_weights(self) -> Weights:
        """The weights of the critic's model under their Hugging Face names, adapters merged."""
        assert self.critic is not None
        return model_weights(self, self.critic.model, self._critic_like)

    def try_export(self, dtype: str | None = None) -> None:
        super().try_export(dtype)
        if not self.critic_options.shares_trunk:
            model = empty_classifier(self.critic_source) if self.critic is None else self.critic.model
            try_export(model, self.critic_source, self._critic_tokenizer, dtype)

    def export(self, folder: str, dtype: str | None = None) -> None:
        """Write the policy as `TrainedModule.export` does, and the critic to its subfolder `critic`.

        That is a Hugging Face classifier, which loads as `model.critic.model` and as a reward model; or the value head
        alone, which a run with `shares_trunk` finds beside the policy that it starts from.

        Args:
            folder: The target; made if missing.
            dtype: Dtype of the weights; None for that of the checkpoints that the run started from.
        """
        super().export(folder, dtype)
        write = self.global_rank == 0
        if self.critic is not None:
            weights = self.critic_weights()
            target = f"{folder}/{FOLDER}"
            export_folder(self.critic.model, self.critic_source, self._critic_tokenizer, weights, target, dtype, write)
            return
        assert self.policy is not None
        head: Any = self.policy.value_head
        state = dict(full_tensors(self, head, lambda name: True))
        if write:
            save_value_head(state, folder)
