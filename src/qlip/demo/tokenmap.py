"""Tokens as a picture: a cell for each token, its colour and its bars made of its bits."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

LARGEST_GRID_WITH_BITS = 16  # tokens a side; beyond, bits are too fine to see and cells are plain
CELL, GAP = 28, 2  # pixels
ZERO_SHADE = 0.7  # how bright a 0 is beside a 1


def token_colors(bits: Tensor) -> Tensor:
    """Give tokens that share many bits like colours: their three principal components as red, green, blue.

    Args:
        bits: (B, N, L) of 0 and 1.

    Returns:
        (B, N, 3) uint8.
    """
    centred = bits.double() - bits.double().mean((0, 1))
    flat = centred.flatten(0, 1)
    axes = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:].flip(-1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # an axis has no sign of its own
    parts = centred @ axes
    parts = parts / parts.std((0, 1)).clamp(min=1e-6)
    colors = 148 + 52 * F.pad(parts, (0, 3 - parts.shape[-1]))
    return colors.round().clamp(40, 245).to(torch.uint8)


def draw(bits: Tensor, colors: Tensor, grid: tuple[int, int]) -> Image.Image:
    """Draw the tokens of one picture where they stand in it.

    Args:
        bits: (N, L) of 0 and 1.
        colors: (N, 3) uint8.
        grid: rows and columns of tokens, N together.

    Returns:
        A cell for each token, which holds its bits in rows, first bit top left, a 1 brighter than a 0; RGBA, clear
        between cells. In grids larger than `LARGEST_GRID_WITH_BITS`, RGB of plain cells.
    """
    height, width = grid
    if max(grid) > LARGEST_GRID_WITH_BITS:
        plain = Image.fromarray(colors.reshape(height, width, 3).numpy())
        return plain.resize((8 * width, 8 * height), Image.Resampling.NEAREST)
    num_bits = bits.shape[-1]
    rows = max(r for r in range(1, num_bits + 1) if num_bits % r == 0 and r * r <= num_bits)
    shades = torch.where(bits.bool(), 1.0, ZERO_SHADE).reshape(height, width, rows, -1, 1)
    cells = (shades * colors.reshape(height, width, 1, 1, 3)).round().to(torch.uint8)
    return Image.fromarray(_with_gaps(cells.numpy()))


def _with_gaps(cells: np.ndarray) -> np.ndarray:
    """(grid height, grid width, rows, columns, 3) → one RGBA picture."""
    rows, columns = cells.shape[2:4]
    cells = cells.repeat(max(1, CELL // rows), axis=2).repeat(max(1, CELL // columns), axis=3)
    opaque = np.full((*cells.shape[:-1], 1), 255, np.uint8)
    half = GAP // 2
    cells = np.pad(np.concatenate((cells, opaque), -1), ((0, 0), (0, 0), (half, half), (half, half), (0, 0)))
    down, across, height, width, _ = cells.shape
    return cells.transpose(0, 2, 1, 3, 4).reshape(down * height, across * width, 4)
