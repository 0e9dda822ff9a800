"""How the sub-tokens of a token are predicted where the transformer reads a token as one position.

Of S sub-tokens of V words each, the transformer's vocabulary has S · V rows, those of the first sub-token first.
A token goes in as the sum of its sub-tokens' embeddings, and its hidden state becomes S logits over V. A *head*
says from what: it turns the hidden state and the sub-tokens before one into the state that this one is read from.
Loss and generator call it alike, so that the one is the other's negative log-likelihood.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlip.lm.config import LMConfig
from qlip.lm.loss import chunked_cross_entropy
from qlip.lm.transformer import MLP, RMSNorm, Transformer


class Parallel(nn.Module):
    """All from the hidden state alone: what a sub-token says of another is lost."""

    def __init__(self, config: LMConfig, num_slots: int):
        super().__init__()
        self.num_slots, self.vocabulary = num_slots, config.vocab_size // num_slots

    def forward(self, hidden: Tensor, before: Tensor, slot: int) -> Tensor:
        """The state that a sub-token is read from.

        Args:
            hidden: (..., D) the transformer's.
            before: (..., D) the sum of the embeddings of the sub-tokens before it.
            slot: which it is, from 0.

        Returns:
            (..., D).
        """
        return hidden

    def embed(self, lm: Transformer, sub_tokens: Tensor) -> Tensor:
        """The first s sub-tokens of tokens, (..., s) in [0, V) → (..., s, D); s may be 0."""
        return lm.embed(
            sub_tokens + self.vocabulary * torch.arange(sub_tokens.shape[-1], device=sub_tokens.device)
        )

    def logits(self, lm: Transformer, hidden: Tensor, drawn: Tensor) -> Tensor:
        """(B, D) hidden states and the (B, s) sub-tokens that are drawn → (B, V) logits of the next."""
        slot = drawn.shape[-1]
        state = self(hidden, self.embed(lm, drawn).sum(-2), slot)
        return F.linear(state, lm.head.chunk(self.num_slots)[slot])

    def loss(self, lm: Transformer, hidden: Tensor, sub_tokens: Tensor, embedded: Tensor) -> Tensor:
        """The sum of −ln p over all sub-tokens.

        Args:
            lm: the transformer.
            hidden: (B, N, D) its states.
            sub_tokens: (B, N, S) what follows them.
            embedded: (B, N, S, D) of these, by `embed`.

        Returns:
            ().
        """
        before, rows = torch.zeros_like(embedded[..., 0, :]), lm.head.chunk(self.num_slots)
        losses = []
        for slot, (targets, own) in enumerate(zip(sub_tokens.unbind(-1), embedded.unbind(-2), strict=True)):
            losses.append(chunked_cross_entropy(self(hidden, before, slot), rows[slot], targets))
            before = before + own
        return torch.stack(losses).sum()


class Chain(Parallel):
    """Each from the hidden state and the sub-tokens before it, by one MLP that all share.

    The sum of their embeddings tells what these are, as each has rows of its own: no attention is needed.
    """

    def __init__(self, config: LMConfig, num_slots: int):
        super().__init__(config, num_slots)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.slots = nn.Embedding(num_slots, width)
        self.proj = nn.Linear(width, width, bias=False)
        self.norm, self.mlp, self.last_norm = RMSNorm(width, eps), MLP(config), RMSNorm(width, eps)
        for parameter in self.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, hidden: Tensor, before: Tensor, slot: int) -> Tensor:
        """See `Parallel`."""
        x = hidden + self.slots.weight[slot] + self.proj(before)
        return self.last_norm(x + self.mlp(self.norm(x)))


HEADS = {"parallel": Parallel, "chain": Chain}
