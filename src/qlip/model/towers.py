"""The towers: pictures to features, features back to pixels, words to embeddings.

Module names are those of the published checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlip.model.config import Grid, ImageTowerConfig, QLIPConfig, TextConfig
from qlip.model.layers import Blocks, GridRotary, Rotary, resize_positions, to_sphere
from qlip.model.quantizer import QuantizerMLP


class VisionEmbeddings(nn.Module):
    """Patches and a CLS token, with learned positions: those of the native grid, interpolated for any other."""

    def __init__(self, config: ImageTowerConfig):
        super().__init__()
        dim, patch = config.hidden_size, config.patch_size
        self.native_grid = config.grid_size, config.grid_size
        self.class_embedding = nn.Parameter(torch.empty(dim))
        self.patch_embedding = nn.Conv2d(config.num_channels, dim, patch, stride=patch)
        self.position_embedding = nn.Embedding(config.num_patches + 1, dim)

    def forward(self, pixel_values: Tensor, kept: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) → (B, 1 + N, D), CLS first; of the patches only those numbered in `kept` (K,), if given."""
        patches = self.patch_embedding(pixel_values)
        rows, columns = patches.shape[2:]
        patches = patches.flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(patches.shape[0], 1, -1)
        positions = self.position_embedding.weight
        resized = resize_positions(positions[1:], self.native_grid, (rows, columns))
        if kept is not None:
            patches, resized = patches[:, kept], resized[kept]
        return torch.cat((cls, patches), dim=1) + torch.cat((positions[:1], resized))


class VisionEncoder(nn.Module):
    """The image tower, with the MLPs on both sides of the quantizer, where published checkpoints keep them."""

    def __init__(self, config: QLIPConfig):
        super().__init__()
        vision, num_bits, post_dim = config.vision, config.num_bits, config.hidden_size_post_q
        dim = vision.hidden_size
        self.embeddings = VisionEmbeddings(vision)
        self.rope = GridRotary(vision.head_dim, self.embeddings.native_grid) if vision.rope else None
        self.grid_of = vision.grid_of
        self.encoder = Blocks(vision)
        self.post_layernorm = nn.LayerNorm(dim, eps=vision.layer_norm_eps)
        self.quant_embed = QuantizerMLP(dim, dim, num_bits, vision.hidden_act)
        self.quant_embed_post = QuantizerMLP(num_bits, post_dim, post_dim, vision.hidden_act)

    def forward(
        self, pixel_values: Tensor, states: list[Tensor] | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """(B, 3, H, W) normalised → (B, 1 + N, D), CLS first, before any final norm.

        Args:
            pixel_values: (B, 3, H, W) normalised.
            states: list that takes the embeddings and the output of each block, all of that shape.
            kept: (K,) numbers of the patches to encode, row-major; None encodes all N.
        """
        rotary = self.rope and self.rope.at(self.grid_of(*pixel_values.shape[2:])).tables
        if rotary and kept is not None:
            rotary = rotary[0][kept], rotary[1][kept]
        return self.encoder(self.embeddings(pixel_values, kept), rotary, states=states)

    def compress(self, features: Tensor) -> Tensor:
        """Patch features Z (B, N, D) → latents (B, N, L), unit vectors, by the down MLP."""
        return to_sphere(self.quant_embed(features))

    def expand(self, codes: Tensor) -> Tensor:
        """Codes (B, N, L) → quantized features Ẑ (B, N, D'), by the up MLP."""
        return self.quant_embed_post(codes)


class Decoder(nn.Module):
    """From quantized features back to pixels, with positions as in `VisionEmbeddings`."""

    def __init__(self, config: ImageTowerConfig):
        super().__init__()
        dim, pixels = config.hidden_size, config.num_channels * config.patch_size**2
        self.native_grid, self.patch_size = (config.grid_size, config.grid_size), config.patch_size
        self.position_embeddings = nn.Parameter(torch.empty(1, config.num_patches, dim))
        self.rope = GridRotary(config.head_dim, self.native_grid) if config.rope else None
        self.encoder = Blocks(config)
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.ffn = nn.Sequential(nn.Linear(dim, config.intermediate_size), nn.Tanh())
        self.conv_out = nn.Linear(config.intermediate_size, pixels)

    def forward(self, features: Tensor, grid: Grid | None = None) -> Tensor:
        """(B, N, D) of a grid, the native one by default → (B, 3, H, W) in normalised pixel space."""
        grid = grid or self.native_grid
        positions = resize_positions(self.position_embeddings[0], self.native_grid, grid)
        x = self.encoder(features + positions, self.rope and self.rope.at(grid).tables)
        x = self.conv_out(self.ffn(self.norm(x)))
        # Fold is "unpatchify": a patch's values lie in the order (channel, row, column).
        height, width = (length * self.patch_size for length in grid)
        return F.fold(x.transpose(1, 2), (height, width), self.patch_size, stride=self.patch_size)


class TextEmbeddings(nn.Module):
    """Tokens with learned positions."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) → (B, T, D)."""
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


class TextEncoder(nn.Module):
    """CLIP's causal text tower, pooled at the end-of-text token.

    A text without one is no error: it is pooled at its first position (its largest id where `eos_token_id` is
    CLIP's legacy 2), as in `transformers`. So end every text.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        self.eos_token_id = config.eos_token_id
        self.embeddings = TextEmbeddings(config)
        positions = torch.arange(config.max_position_embeddings, device="cpu").float()[:, None]
        self.rope = Rotary(positions, config.head_dim) if config.rope else None
        self.encoder = Blocks(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) ids, optional (B, T) mask with 1 for real tokens → (B, D) pooled."""
        x = self.states(input_ids, attention_mask)
        return x[torch.arange(x.shape[0], device=x.device), self._end_positions(input_ids)]

    def states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """As `forward`, before pooling: (B, T, D), after the last norm."""
        mask = None
        if attention_mask is not None:
            causal = torch.ones(input_ids.shape[1:] * 2, dtype=torch.bool, device=input_ids.device).tril()
            # The diagonal stays visible, so that no row is empty (an empty row would give NaN).
            mask = (causal & attention_mask.bool()[:, None]) | torch.eye(
                len(causal), dtype=torch.bool, device=causal.device
            )
            mask = mask[:, None]
        rotary = self.rope and self.rope.tables
        x = self.encoder(self.embeddings(input_ids), rotary, mask, is_causal=mask is None)
        return self.final_layer_norm(x)

    def _end_positions(self, input_ids: Tensor) -> Tensor:
        if self.eos_token_id == 2:  # CLIP's legacy config: the end token is the largest id
            return input_ids.argmax(-1)
        return (input_ids == self.eos_token_id).int().argmax(-1)
