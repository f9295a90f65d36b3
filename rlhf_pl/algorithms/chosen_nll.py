"""The likelihood of chosen responses, to be added to a loss on pairs."""

from torch import Tensor

from rlhf_pl.algorithms.policy_loss import PolicyLoss
from rlhf_pl.algorithms.prompt_groups import PromptGroups


class ChosenNLL(PolicyLoss):
    """Negative log-likelihood of the chosen responses, a mean over their tokens: supervised fine-tuning on them.

    Alone, or in `SumOfLosses` beside a loss on pairs. A response that several pairs choose counts once.
    """

    needs = frozenset[str]()
    per = "token"
    on_pairs = True

    def counts_in(self, groups: PromptGroups) -> Tensor:
        return groups.lengths * groups.is_chosen

    def losses(self, groups: PromptGroups) -> Tensor:
        return -groups.token_logps[groups.per_token(groups.is_chosen)]

    @property
    def meaning(self) -> str:
        return (
            "negative log-prob of the chosen responses' tokens, nats a token; without a reference a run starts where "
            "its policy is; it falls as chosen responses become likelier"
        )
