"""Reward on held-out prompts, and the distance of a policy from its start, by forward passes of its own."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.algorithms.tasks import Task, read_prompts
from rlhf_pl.models.chat import encode_prompt
from rlhf_pl.models.source import ModelSource
from rlhf_pl.rewards.function import import_function
from rlhf_pl.rollout import EngineSpec, PromptTokens, Response, SamplingConfig, TransformersSampler

BATCH = 16  # responses of a forward pass


class HeldOut:
    """Evaluates policies on the held-out prompts of a task, always with the same seeds.

    Args:
        task: The task.
        model: Folder of the starting policy.
        prompts: File of the held-out prompts.
    """

    def __init__(self, task: Task, model: Path, prompts: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.task, self.source = task, ModelSource(str(model))
        self.prompts = read_prompts(prompts)
        tokenizer = self.source.tokenizer
        self.ids = [encode_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in self.prompts]
        self.sampling = SamplingConfig(task.held_out_responses, task.temperature, max_response_tokens=task.max_tokens)
        self.sampler = TransformersSampler()
        self.sampler.start(EngineSpec(self.source, max(map(len, self.ids)) + task.max_tokens, len(self.ids)))
        self.start, self.policy = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2))

    def evaluate(self, weights: dict[str, Tensor]) -> dict[str, float]:
        """Numbers about the policy with these weights.

        Returns:
            `reward`: mean over all responses; `spread`: standard deviation of the reward over responses to one prompt;
            `ties`: share of the prompts whose responses all have the same reward; `kl`: KL(policy || start), nats per
            response; `entropy`: nats per token; `tokens`: mean length of responses.
        """
        self.policy.load_state_dict(weights)
        self.sampler.load_weights(self.policy.state_dict().items())
        requests = [PromptTokens(ids, seed=1000 * i, logps=False) for i, ids in enumerate(self.ids)]
        found = sorted(self.sampler.generate(requests, self.sampling))
        rewards = torch.tensor([[self._score(i, response) for response in group] for i, group in found])
        rows = [(self.ids[i], response.token_ids) for i, group in found for response in group]
        kl, entropy = self._distances(rows)
        lengths = torch.tensor([len(response) for _, response in rows])
        return {
            "reward": rewards.mean().item(),
            "spread": rewards.var(dim=1).mean().sqrt().item(),
            "ties": (rewards == rewards[:, :1]).all(dim=1).float().mean().item(),
            "kl": kl.mean().item(),
            "entropy": (entropy.sum() / lengths.sum()).item(),
            "tokens": lengths.float().mean().item(),
        }

    def _score(self, index: int, response: Response) -> float:
        function = import_function(self.task.reward)
        given = {
            "prompt": self.prompts[index],
            "response": self.source.tokenizer.decode(response.token_ids, skip_special_tokens=True),
            "finished": response.finished,
        }
        return float(function(**{name: given[name] for name in inspect.signature(function).parameters}))

    @torch.no_grad()
    def _distances(self, rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        """KL(policy || start) and entropy of the policy, each summed over a response's tokens, shape (R,), nats.

        Both are sums over the vocabulary at each position of the policy's own responses. Their mean over responses is
        that of the log-ratio of the sampled tokens, with less variance.
        """
        kls: list[Tensor] = []
        entropies: list[Tensor] = []
        for first in range(0, len(rows), BATCH):
            batch = rows[first : first + BATCH]
            width = max(len(prompt) + len(response) for prompt, response in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            present, predicts = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
            for row, (prompt, response) in enumerate(batch):
                end = len(prompt) + len(response)
                ids[row, :end] = torch.tensor(prompt + response)
                present[row, :end] = 1
                predicts[row, len(prompt) - 1 : end - 1] = True
            new, old = (self._logps(model, ids, present, predicts) for model in (self.policy, self.start))
            probabilities = new.exp()
            for sums, values in ((kls, new - old), (entropies, -new)):
                at_tokens = (probabilities * values).sum(-1).split([len(response) for _, response in batch])
                sums += [tokens.sum() for tokens in at_tokens]
        return torch.stack(kls), torch.stack(entropies)

    def _logps(self, model: Any, ids: Tensor, present: Tensor, predicts: Tensor) -> Tensor:
        """Log-probs of all tokens of the vocabulary at the sampling temperature, where `predicts`, shape (M, V)."""
        hidden = model.base_model(input_ids=ids, attention_mask=present, use_cache=False).last_hidden_state
        return (model.get_output_embeddings()(hidden[predicts]) / self.task.temperature).log_softmax(-1)
