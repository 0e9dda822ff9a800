"""The decoder-only transformer that text-to-image and UM3 share: a Llama, readable from here to the end.

- RMSNorm before attention and MLP, SwiGLU, no biases; the head has weights of its own or the embedding's.
- Rotary positions along one axis (text), with the scaling of Llama 3, or along two (rows and columns of an image).
  The sub-tokens of one place share its position; a slot embedding tells them apart.
- Grouped-query attention; QK-norm as Qwen3's, an RMSNorm over each head before the rotation.
- Documents packed into one sequence do not see each other.
- A preallocated cache of keys and values for decoding.

Parameters are named as in Hugging Face's checkpoints (`qlip.lm.checkpoint`), and the rotation is theirs: dimension
i of a head is paired with i + head_dim/2. Hidden states become logits by `Transformer.logits` and not before, so
that a loss can take them in chunks (`qlip.lm.loss`), or over a part of the vocabulary.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from qlip.errors import InputError
from qlip.lm.config import LMConfig

Tables = tuple[Tensor, Tensor]
Mask = Tensor | BlockMask
"""(B or 1, 1, T, S) booleans, True where a key may be seen; or on a GPU flex_attention's own form of them."""


def rotary_tables(positions: Tensor, config: LMConfig) -> Tables:
    """Cosines and sines by which queries and keys are turned.

    Computed anew each time: it is little work, and stored tables would be cast with the model.

    Args:
        positions: (B, T), or (B, T, 2) with `rope_axes` 2.
        config: the model's.

    Returns:
        Both (B, T, 1, head_dim) float32; the second half's angles are the first's, and in each rows come before
        columns.
    """
    width = config.head_width // config.rope_axes
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, width, 2, device=positions.device).float() / width)
    if (scaling := config.rope_scaling) is not None:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    by_axis = positions[..., None] if config.rope_axes == 1 else positions
    angles = (by_axis[..., None].float() * frequencies).flatten(2)
    angles = torch.cat((angles, angles), dim=-1)[:, :, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: Tables) -> Tensor:
    """Turn queries or keys (B, T, heads, head_dim) in float32, and give them back in their dtype."""
    cos, sin = tables
    x0, x1 = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-x1, x0), dim=-1) * sin).to(x.dtype)


def grid_positions(height: int, width: int, num_slots: int = 1) -> Tensor:
    """(height · width · num_slots, 2) rows and columns, row by row; the sub-tokens of a place share them.

    They count from 1: at (0, 0) nothing is turned, and there stands the text before the image. (LlamaGen's table
    has zeros for it, which make the text's queries and keys zero.)
    """
    rows, columns = torch.meshgrid(torch.arange(1, height + 1), torch.arange(1, width + 1), indexing="ij")
    return torch.stack((rows, columns), dim=-1).flatten(0, 1).repeat_interleave(num_slots, dim=0)


def document_mask(document_ids: Tensor) -> Mask:
    """What each token of packed documents may see: those before it in its own document, and itself.

    Args:
        document_ids: (B, T) integers, the same within a document.

    Returns:
        The mask for `Transformer`. On a GPU it is for flex_attention, which leaves out the blocks where nothing is
        seen; on a CPU, where that has no backward pass, (B, 1, T, T) booleans.
    """
    batch_size, length = document_ids.shape
    if document_ids.device.type != "cuda":
        return causal_mask(length, document_ids.device) & (
            document_ids[:, None, :, None] == document_ids[:, None, None]
        )

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[row, query] == document_ids[row, key])

    return create_block_mask(seen, batch_size, None, length, length, device=str(document_ids.device))


def causal_mask(length: int, device: torch.device | str = "cpu") -> Tensor:
    """(T, T) booleans: a token sees those before it and itself. It is what no mask means."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class LayerCache(NamedTuple):
    """Where a layer keeps keys and values (B, kv_heads, capacity, head_dim), and the places (T,) now written."""

    keys: Tensor
    values: Tensor
    places: Tensor

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, kv_heads, T, head_dim) of new tokens → keys and values of all places."""
        self.keys.index_copy_(2, self.places, k.to(self.keys.dtype))
        self.values.index_copy_(2, self.places, v.to(self.values.dtype))
        return self.keys, self.values


class Cache:
    """Keys and values of the tokens read so far. Shorter rows of a batch stand at the right, padded on the left.

    So all rows write to the same place, and every decoding step has the same shapes: it compiles once. The price:
    a step looks at all places, empty ones too.

    Attributes:
        keys, values: of each layer (B, kv_heads, capacity, head_dim); zeros at first, as 0 · NaN would be NaN.
        padding: (B,) empty places at each row's beginning.
        length: () places taken.
    """

    def __init__(self, model: "Transformer", padding: Tensor, capacity: int):
        """Make room.

        Args:
            model: whose; the cache has its dtype and device.
            padding: (B,) int64 on that device.
            capacity: tokens of a row, padding included.

        Raises:
            InputError: the model reads no sequences of this length.
        """
        config = model.config
        config.check_length(capacity)
        shape = len(padding), config.kv_heads, capacity, config.head_width
        layers = range(config.num_hidden_layers)
        self.keys, self.values = ([model.norm.weight.new_zeros(shape) for _ in layers] for _ in "kv")
        self.padding, self.length = padding, torch.zeros((), dtype=torch.long, device=model.device)

    def take(self, count: int) -> Tensor:
        """The next places, (count,)."""
        places = self.length + torch.arange(count, device=self.length.device)
        self.length += count
        return places

    def positions(self, places: Tensor) -> Tensor:
        """(T,) → (B, T): a row's first token has position 0."""
        return (places - self.padding[:, None]).clamp(min=0)

    def mask(self, places: Tensor) -> Tensor:
        """(T,) → (B, 1, T, capacity): what is read already. Padding sees itself: of nothing there is no mean."""
        keys = torch.arange(self.keys[0].shape[-2], device=places.device)
        first = torch.minimum(self.padding[:, None], places)
        return ((first[..., None] <= keys) & (keys <= places[:, None]))[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, in_float32: bool | None = None) -> Tensor:
    """Queries (B, heads, T, head_dim), keys and values (B, kv_heads, S, head_dim) → as the queries, in v's dtype.

    Args:
        q, k, v: as above.
        mask: which keys a query sees; None: all up to itself.
        in_float32: compute in float32 at least; None: on a CPU if there are gradients, whose pass half precision
            slows down.
    """
    groups = q.shape[1] // k.shape[1]
    if isinstance(mask, BlockMask):
        return _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=groups > 1)
    if groups > 1 and q.shape[2] == 1:  # decoding: a group's queries stand as those of one head, nothing is copied
        heads = q.unflatten(1, (-1, groups)).squeeze(3)
        return attend(heads, k, v, mask, in_float32).flatten(1, 2).unsqueeze(2)
    if groups > 1:  # PyTorch's own grouping, with a mask on a GPU, is no fused kernel
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    dtype = v.dtype
    if in_float32 is None:
        in_float32 = q.device.type == "cpu" and torch.is_grad_enabled()
    if in_float32:
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.to(v.dtype), k.to(v.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).to(dtype)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, in float32 at least, given back in the dtype of x."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) → (..., dim)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    Attributes:
        in_float32: whether scores and their sums are computed in float32; see `attend`.
    """

    in_float32: bool | None = None

    def __init__(self, config: LMConfig):
        super().__init__()
        dim, self.head_dim = config.hidden_size, config.head_width
        self.q_proj = nn.Linear(dim, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(dim, config.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, config.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, dim, bias=False)
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in "qk"
        )

    def forward(self, x: Tensor, rotary: Tables, mask: Mask | None, cache: LayerCache | None) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if cache is not None:
            k, v = cache.write(k, v)
        return self.o_proj(attend(q, k, v, mask, self.in_float32).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: `down(silu(gate x) · up x)`."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each with a norm before and a residual connection around it."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Tables, mask: Mask | None, cache: LayerCache | None) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotary, mask, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Transformer(nn.Module):
    """Tokens, or embeddings of anything, to hidden states; those to logits.

    Attributes:
        config: its shape.
        recompute: hold only what lies between blocks for the backward pass and compute the rest again (activation
            checkpointing).
    """

    def __init__(self, config: LMConfig):
        """Draw weights from a normal distribution of standard deviation 0.02."""
        super().__init__()
        self.config, self.recompute = config, False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_slots = nn.Embedding(config.num_slots, config.hidden_size) if config.num_slots else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02)

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.norm.weight.dtype

    @property
    def head(self) -> Tensor:
        """(vocab_size, D) weights that make logits of hidden states; some rows are a part of the vocabulary."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def embed(self, input_ids: Tensor, slots: Tensor | None = None) -> Tensor:
        """(..., T) ids → (..., T, D).

        Args:
            input_ids: integers in [0, vocab_size).
            slots: which sub-token of its place each is, broadcastable to the ids; None for text.

        Raises:
            InputError: there are slots, but the model has no `num_slots`.
        """
        x = self.embed_tokens(input_ids)
        if slots is None:
            return x
        if self.embed_slots is None:
            raise InputError(
                "num_slots is 0, but there are slots: leave them out, or make the model with num_slots"
            )
        return x + self.embed_slots(slots)

    def forward(
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """(B, T) ids, or (B, T, D) embeddings → (B, T, D) hidden states, after the last norm.

        Args:
            inputs: integers are embedded by `embed`, without slots.
            positions: (B or 1, T), or (B or 1, T, 2) with `rope_axes` 2, integers. By default tokens are counted
                from 0, in a cache from each row's first one.
            mask: which keys each query sees, such as `document_mask`; by default all up to itself. A cache has its
                own.
            cache: what was read before; the new tokens see it, and are added.

        Raises:
            InputError: the sequence is longer than the model's context, or two axes lack their positions.
        """
        x = inputs if inputs.is_floating_point() else self.embed(inputs)
        length = x.shape[1]
        self.config.check_length(length)
        places = torch.arange(length, device=x.device) if cache is None else cache.take(length)
        if cache is not None:
            mask = cache.mask(places)
        if positions is None:
            if self.config.rope_axes > 1:
                raise InputError("positions are missing: with rope_axes 2 pass (B, T, 2) rows and columns")
            positions = places[None] if cache is None else cache.positions(places)
        rotary = rotary_tables(positions, self.config)
        x = self.dropout(x)
        for i, layer in enumerate(self.layers):
            own = None if cache is None else LayerCache(cache.keys[i], cache.values[i], places)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, mask, own, use_reentrant=False)
            else:
                x = layer(x, rotary, mask, own)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) hidden states → (..., vocab_size) scores of the token that follows."""
        return F.linear(hidden, self.head)


@functools.cache
def _compiled_flex():
    return torch.compile(flex_attention)  # as it stands it would hold all scores at once
