"""The one transformer block that serves all towers, with the switches of the published config."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlip.model.config import Grid, TowerConfig

Tables = tuple[Tensor, Tensor]

_ACTIVATIONS = {
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def activation(x: Tensor, name: str) -> Tensor:
    """Apply the activation that the config names; "gelu" is the exact one."""
    return _ACTIVATIONS[name](x)


def to_sphere(x: Tensor) -> Tensor:
    """(..., D) → unit vectors, in float32 at least, whatever the dtype of `x` and under autocast too."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class Rotary(nn.Module):
    """Rotary position embedding over one axis (text) or two (rows and columns of patches).

    The head's width is shared equally among the axes; each axis has d = head_dim / axes dimensions with
    frequencies θ^(−2j/d), j < d/2, every angle standing twice in a row for the pair that it turns.
    (EVA-02, section 2; docs/paper.md section 1.)
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, positions: Tensor, head_dim: int, theta: float = 1e4):
        """Compute the tables.

        Args:
            positions: (N, axes) float, the place of each token along each axis.
            head_dim: width of an attention head.
            theta: base of the frequencies.
        """
        super().__init__()
        self.positions, self.head_dim, self.theta = positions, head_dim, theta
        # Not persistent: checkpoints may hold these once a tower, once a layer or not at all.
        for name, table in zip(("cos", "sin"), self._compute(), strict=True):
            self.register_buffer(name, table, persistent=False)

    def _compute(self) -> Tables:
        dim = self.head_dim // self.positions.shape[-1]
        frequencies = self.theta ** (-torch.arange(0, dim, 2, device="cpu").float() / dim)
        angles = (self.positions[..., None] * frequencies).repeat_interleave(2, dim=-1).flatten(1)
        return angles.cos(), angles.sin()

    def refill(self) -> None:
        """Compute the tables again, in place: for who materialised a model from the meta device."""
        for table, values in zip(self.tables, self._compute(), strict=True):
            table.copy_(values)

    def _apply(self, fn, recurse=True):
        """Compute the tables again where the module goes.

        So they stay float32 when the model is cast, and have their values after `to_empty`, which only makes room:
        no checkpoint would fill them.
        """
        super()._apply(fn, recurse)
        self.cos, self.sin = (table.to(self.cos.device) for table in self._compute())
        return self

    @property
    def tables(self) -> Tables:
        """Cosines and sines, both (N, head_dim) float32."""
        return self.cos, self.sin


def rotate(x: Tensor, tables: Tables) -> Tensor:
    """Turn the last N tokens of queries or keys (..., T, head_dim); those before them (CLS) stay.

    If there are fewer than N, as in a short text, they take the first positions.
    """
    cos, sin = tables
    num_plain = max(x.shape[-2] - cos.shape[0], 0)
    plain, x = x[..., :num_plain, :], x[..., num_plain:, :]
    cos, sin = cos[: x.shape[-2]], sin[: x.shape[-2]]
    x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-x1, x0), dim=-1).flatten(-2)
    x = (x * cos + turned * sin).to(x.dtype)
    return torch.cat((plain, x), dim=-2) if num_plain else x


class GridRotary(Rotary):
    """Rotary over a grid of patches, row-major; a side spans 16 units whatever its length.

    So a picture's edges keep their places when its size changes, as with interpolated positions. It is how EVA-02
    goes from 16 x 16 patches to other grids.
    """

    def __init__(self, head_dim: int, grid: Grid):
        """Compute the tables of a grid."""
        rows, columns = (torch.arange(length, device="cpu").float() / length * 16 for length in grid)
        super().__init__(torch.cartesian_prod(rows, columns), head_dim)
        self.grid = grid

    def at(self, grid: Grid) -> "GridRotary":
        """The same over another grid."""
        return self if grid == self.grid else GridRotary(self.head_dim, grid).to(self.cos.device)


def resize_positions(positions: Tensor, old: Grid, new: Grid) -> Tensor:
    """Learnt positions of one grid → of another, by bicubic interpolation; gradients flow.

    Args:
        positions: (rows · columns, D), row-major.
        old: their grid.
        new: the grid to have.

    Returns:
        The same dtype, interpolated in float32 at least; `positions` themselves if the grid stays.
    """
    if new == old:
        return positions
    image = positions.to(torch.promote_types(positions.dtype, torch.float32)).T.unflatten(1, old)[None]
    resized = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
    return resized[0].flatten(1).T.to(positions.dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, in_float32: bool | None = None
) -> Tensor:
    """(B, heads, T, head_dim) queries, keys and values → the same shape, in the values' dtype.

    Args:
        q, k, v: as above.
        mask: boolean, True where a key may be seen.
        is_causal: every token sees those before it and itself.
        in_float32: compute in float32 at least; None: on a CPU, where half precision is rarely faster.
    """
    if in_float32 is None:
        in_float32 = q.device.type == "cpu"
    if not in_float32:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    dtype = v.dtype
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal).to(dtype)


class Attention(nn.Module):
    """Multi-head self-attention; with `subln`, a LayerNorm on the concatenated heads.

    Attributes:
        in_float32: whether scores and their sums are computed in float32; see `attend`.
    """

    in_float32: bool | None = None

    def __init__(self, config: TowerConfig):
        super().__init__()
        dim = config.hidden_size
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(dim, dim, bias=config.q_bias)
        self.k_proj = nn.Linear(dim, dim, bias=config.k_bias)
        self.v_proj = nn.Linear(dim, dim, bias=config.v_bias)
        self.inner_attn_ln = nn.LayerNorm(dim, eps=config.layer_norm_eps) if config.subln else nn.Identity()
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotary: Tables | None, mask: Tensor | None, is_causal: bool) -> Tensor:
        """(B, T, D) → (B, T, D). `mask` is boolean, True where a key may be seen, (B, 1, T, T)."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        x = attend(q, k, v, mask, is_causal, self.in_float32)
        return self.out_proj(self.inner_attn_ln(x.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """`fc2(act(fc1 x))`."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.hidden_act = config.hidden_act
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D)."""
        return self.fc2(activation(self.fc1(x), self.hidden_act))


class SwiGLU(nn.Module):
    """`w3(LN(silu(w1 x) * w2 x))`; the LayerNorm with `subln` only."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        dim, hidden = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(dim, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=config.layer_norm_eps) if config.subln else nn.Identity()
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D)."""
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class Block(nn.Module):
    """A pre-LayerNorm transformer block."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SwiGLU(config) if config.swiglu else MLP(config)

    def forward(
        self, x: Tensor, rotary: Tables | None = None, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        x = x + self.self_attn(self.layer_norm1(x), rotary, mask, is_causal)
        return x + self.mlp(self.layer_norm2(x))


class Blocks(nn.Module):
    """The blocks of a tower, one after the other.

    Attributes:
        recompute: hold only what lies between blocks for the backward pass and compute the rest again
            (activation checkpointing): memory for a third more time.
    """

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.recompute = False
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))

    def forward(
        self,
        x: Tensor,
        rotary: Tables | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """(B, T, D) → (B, T, D), before any final norm; `states` takes it as it is before and after each block."""
        if states is not None:
            states.append(x)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, mask, is_causal, use_reentrant=False)
            else:
                x = layer(x, rotary, mask, is_causal)
            if states is not None:
                states.append(x)
        return x
