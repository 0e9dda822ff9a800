"""A picture's tokens after a text: LlamaGen on QLIP's tokens.

    text features ─ projector ─┐
                               ├─ Transformer ─ logits of the next sub-token
    sub-tokens ── embedding ───┘

A token of L bits is L / bits sub-tokens. They follow one another, all with the token's row and column; or a token
is one position, and a head predicts them from the state before it (`qlip.t2i.heads`). The text stands at (0, 0),
where nothing is turned, so that its length does not matter. A condition that is left out is one learned vector in
its place.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qlip.bits import sub_tokens_to_tokens
from qlip.errors import InputError
from qlip.lm.generate import Parts, Sampling, generate
from qlip.lm.loss import chunked_cross_entropy
from qlip.lm.transformer import Transformer, causal_mask, grid_positions
from qlip.t2i.config import T2IConfig
from qlip.t2i.heads import HEADS

PUBLISHED = Sampling(guidance_scale=7.5, top_k=1000)  # how LlamaGen and the paper sample


class T2I(nn.Module):
    """The model.

    Attributes:
        config: what it is.
        lm: the transformer.
        condition: from features or labels to its prefix.
        head: what predicts a whole token; None: its sub-tokens follow one another in the transformer.
    """

    def __init__(self, config: T2IConfig):
        """Draw weights from a normal distribution of standard deviation 0.02; logits begin with zeros."""
        super().__init__()
        self.config = config
        self.lm = Transformer(config.lm)
        width = config.lm.hidden_size
        if config.embedding == "bits":
            words = config.lm.vocab_size >> config.bits
            self.lm.embed_tokens = BitEmbedding(config.bits, width, words)  # type: ignore[assignment]
        self.condition = Labels(config.num_classes, width) if config.with_classes else Projector(config)
        self.head = None if config.head == "sequence" else HEADS[config.head](config.lm, config.num_slots)
        nn.init.zeros_(self.lm.head)

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.lm.device

    def forward(self, condition: Tensor, lengths: Tensor, sub_tokens: Tensor, dropped: Tensor) -> Tensor:
        """The loss.

        Args:
            condition: features (B, S, W), each text at the right, or labels (B, 1).
            lengths: (B,) how many of the S are the text's.
            sub_tokens: (B, N, L/bits) in [0, 2^bits).
            dropped: (B,) booleans, True where the condition is left out.

        Returns:
            (), −ln p of a sub-token, the mean over all; `bits_per_image` gives it another unit.
        """
        self._check_count(sub_tokens[0].numel())
        prefix = self.condition(condition, dropped)
        if self.head is None:
            targets = sub_tokens.flatten(1)
            hidden = self._read(prefix, lengths, dropped, self.lm.embed(targets, self._places(targets.device)[1]))
            total = chunked_cross_entropy(hidden, self.lm.head, targets)
        else:
            embedded = self.head.embed(self.lm, sub_tokens)
            hidden = self._read(prefix, lengths, dropped, embedded.sum(-2))
            total = self.head.loss(self.lm, hidden, sub_tokens, embedded)
        return total / sub_tokens.numel()

    def _read(self, prefix: Tensor, lengths: Tensor, dropped: Tensor, image: Tensor) -> Tensor:
        """A prefix and the embeddings (B, P, D) of a picture → (B, P, D), the states before each of these."""
        length = prefix.shape[1]
        inputs = torch.cat((prefix.to(image.dtype), image[:, :-1]), dim=1)
        positions, _ = self._places(image.device)
        positions = torch.cat((positions.new_zeros(length, 2), positions[:-1]))[None]
        read = torch.where(dropped, 1, lengths)
        return self.lm(inputs, positions, _prefix_mask(read, length, inputs.shape[1]))[:, length - 1 :]

    def bits_per_image(self, loss: Tensor | float) -> float:
        """What `forward` gives → bits for a whole picture; comparable between widths of sub-tokens."""
        return float(loss) * self.config.num_sub_tokens / math.log(2)

    @torch.no_grad()
    def generate(
        self,
        conditions: Sequence[Tensor],
        sampling: Sampling = PUBLISHED,
        seeds: Sequence[int] | None = None,
        compile: bool = False,
    ) -> Tensor:
        """Draw pictures.

        Args:
            conditions: of each row a text's features (T, W), or its label ().
            sampling: how sub-tokens are drawn.
            seeds: of each row; the same seed and condition give the same picture, whatever the others are.
            compile: see `qlip.lm.generate.generate`.

        Returns:
            (B, N) int64 tokens in [0, 2^L).

        Raises:
            InputError: a text is empty or too long, or guidance is asked of a model that never learnt without
                conditions.
        """
        if sampling.guidance_scale != 1 and not self.config.condition_dropout:
            raise InputError(
                "guidance needs a model that was trained with condition_dropout, and this has 0: use a scale of 1"
            )
        for row in conditions:
            if row.ndim == 2 and not 0 < len(row) <= self.config.num_text_tokens:
                raise InputError(
                    f"a text has {len(row)} tokens: this model reads 1 to {self.config.num_text_tokens}"
                )
        shown, hidden = (torch.full((1,), flag, device=self.device) for flag in (False, True))
        prefixes = [self.condition(row.to(self.device)[None], shown)[0] for row in conditions]
        nothing = self.condition(conditions[0].to(self.device)[None], hidden)[0, -1:]
        positions, slots = self._places(self.device)
        drawn = generate(
            self.lm,
            prefixes,
            len(positions),
            sampling,
            seeds=seeds,
            unconditional=[nothing] * len(prefixes),
            positions=positions,
            slots=slots if self.head is None else None,
            parts=self._parts(),
            compile=compile,
        )
        sub_tokens = drawn.reshape(len(prefixes), -1, self.config.num_slots)
        return sub_tokens_to_tokens(sub_tokens, self.config.num_bits, self.config.bits)

    def _parts(self) -> Parts | None:
        """How `generate` draws whole tokens."""
        if (head := self.head) is None:
            return None
        return Parts(
            self.config.num_slots, lambda ids: head.embed(self.lm, ids).sum(-2), partial(head.logits, self.lm)
        )

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows and columns, and slots, of the transformer's positions in a picture."""
        count = self.config.slots_in_sequence
        positions = grid_positions(*self.config.grid, count).to(device)
        return positions, torch.arange(len(positions), device=device) % count

    def _check_count(self, count: int) -> None:
        if count != self.config.num_sub_tokens:
            raise InputError(
                f"a picture has {count} sub-tokens, this model's have {self.config.num_sub_tokens}: its grid is "
                f"{self.config.grid}, its sub-tokens have {self.config.bits} bits"
            )


class Projector(nn.Module):
    """Text features to prefix: Linear–GELU–Linear without biases, as LlamaGen's."""

    def __init__(self, config: T2IConfig):
        super().__init__()
        features, width = config.condition_width, config.lm.hidden_size
        self.unconditional = nn.Parameter(torch.randn(features) * features**-0.5)
        self.fc1 = nn.Linear(features, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.fc1.weight, std=0.02)
        nn.init.normal_(self.fc2.weight, std=0.02)

    def forward(self, features: Tensor, dropped: Tensor) -> Tensor:
        """(B, S, W) and (B,) booleans, whose rows are the unconditional vector → (B, S, D)."""
        features = features.to(self.unconditional.dtype)
        shown = torch.where(dropped[:, None, None], self.unconditional, features)
        return self.fc2(F.gelu(self.fc1(shown), approximate="tanh"))


class Labels(nn.Module):
    """Labels to prefix, a row for each and one for none, as LlamaGen's class-conditional form."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, labels: Tensor, dropped: Tensor) -> Tensor:
        """(B, 1) or (B,) labels and (B,) booleans → (B, 1, D)."""
        labels, none = labels.reshape(-1, 1), self.table.num_embeddings - 1
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < none:
            raise InputError(
                f"labels range over [{int(labels.min())}, {int(labels.max())}]: this model knows 0 to {none - 1}"
            )
        return self.table(torch.where(dropped[:, None], none, labels))


class BitEmbedding(nn.Module):
    """A sub-token's vector as a linear map of its bits, taken as −1 and 1; each slot's vocabulary has its own."""

    def __init__(self, bits: int, width: int, num_slots: int):
        super().__init__()
        self.bits, self.num_slots = bits, num_slots
        self.proj = nn.Linear(num_slots * bits, width, bias=False)
        nn.init.normal_(self.proj.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) → (..., D)."""
        shifts = torch.arange(self.bits - 1, -1, -1, device=ids.device)  # `unpack` would check, and wait for a GPU
        signs = ((ids[..., None] >> shifts) & 1) * 2 - 1
        slots = F.one_hot(ids >> self.bits, self.num_slots)
        return self.proj((slots[..., None] * signs[..., None, :]).flatten(-2).to(self.proj.weight.dtype))


def pad_left(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Conditions of several lengths → what `T2I.forward` takes.

    Args:
        rows: of each its features (T, W), or its label ().

    Returns:
        (B, S, W) with each at the right, or (B, 1); and (B,) lengths.
    """
    if rows[0].ndim == 0:
        return torch.stack(list(rows))[:, None], torch.ones(len(rows), dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows])
    return pad_sequence(list(rows), batch_first=True, padding_side="left"), lengths


def _prefix_mask(lengths: Tensor, prefix: int, total: int) -> Tensor | None:
    """(B, 1, total, total): what is before, without the padding of the prefix, which sees itself."""
    if prefix == 1:
        return None
    places = torch.arange(total, device=lengths.device)
    real = places >= (prefix - lengths)[:, None]
    causal = causal_mask(total, lengths.device)
    return ((causal & real[:, None]) | torch.eye(total, dtype=torch.bool, device=lengths.device))[:, None]
