"""Rotary positions and activations, against complex numbers and `transformers`."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import CLIPVisionConfig
from transformers.activations import ACT2FN
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from qlip.model import TextConfig
from qlip.model.config import ACTIVATIONS
from qlip.model.layers import (
    Attention,
    Block,
    Blocks,
    GridRotary,
    Rotary,
    SwiGLU,
    activation,
    attend,
    resize_positions,
    rotate,
    to_sphere,
)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(activation(x, name), ACT2FN[name](x))


def turn(x, angles):
    """Adjacent pairs of x as complex numbers, each turned by its angle."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


@pytest.mark.parametrize(
    ("rows", "columns", "head_dim"), [(1, 1, 4), (3, 3, 8), (4, 4, 12), (28, 28, 64), (2, 3, 8), (16, 5, 12)]
)
def test_grid_rotary_turns_pairs_by_row_and_column(rows, columns, head_dim):
    rotary = GridRotary(head_dim, (4, 4)).at((rows, columns))
    x = torch.randn(2, 3, 1 + rows * columns, head_dim)
    dim = head_dim // 2
    turned = rotate(x, rotary.tables).double()
    frequencies = 1e4 ** (-2 * torch.arange(dim // 2, dtype=torch.float64) / dim)
    for i in range(rows * columns):
        row, column = i // columns / rows * 16, i % columns / columns * 16
        angles = torch.cat((row * frequencies, column * frequencies))
        expected = turn(x[:, :, 1 + i], angles)
        torch.testing.assert_close(turned[:, :, 1 + i], expected, rtol=0, atol=2e-5)
    assert torch.equal(rotate(x, rotary.tables)[:, :, 0], x[:, :, 0])  # CLS
    without = rotate(x[:, :, 1:], rotary.tables)  # as in the decoder
    torch.testing.assert_close(without, rotate(x, rotary.tables)[:, :, 1:])


def scores(rotary, q, k, length):
    """q·k of the same query and key at all positions."""
    q, k = (rotate(x.expand(length, -1), rotary.tables) for x in (q, k))
    return (q @ k.T).double()


def test_text_scores_depend_on_distance_only():
    rotary = Rotary(torch.arange(9.0)[:, None], 12)
    table = scores(rotary, *torch.randn(2, 12), length=9)
    for distance in range(-8, 9):
        line = torch.diagonal(table, distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=0, atol=1e-5)
    assert table.std() > 0.1


def test_image_scores_depend_on_both_distances_only():
    grid = 4
    rotary = GridRotary(16, (grid, grid))
    table = scores(rotary, *torch.randn(2, 16), length=grid**2).view(grid, grid, grid, grid)
    torch.testing.assert_close(table[1:, 1:, 1:, 1:], table[:-1, :-1, :-1, :-1], rtol=0, atol=1e-5)
    assert not torch.allclose(table[0, 0], table[0, 0].T)  # rows and columns have their own dimensions


def test_a_short_text_takes_the_first_positions():
    rotary, x = Rotary(torch.arange(9.0)[:, None], 12), torch.randn(2, 9, 12)
    assert torch.equal(rotate(x[:, :4], rotary.tables), rotate(x, rotary.tables)[:, :4])


def test_rotary_keeps_the_dtype():
    rotary = GridRotary(16, (2, 2))
    assert rotate(torch.randn(1, 1, 5, 16, dtype=torch.bfloat16), rotary.tables).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rotary_tables_stay_float32_when_cast_and_follow_to_a_device(dtype):
    rotary = Rotary(torch.arange(9.0)[:, None], 12)
    cos, sin = rotary.cos.clone(), rotary.sin.clone()
    cast = torch.nn.Sequential(rotary).to(dtype)[0]
    assert cast.cos.dtype == cast.sin.dtype == torch.float32
    assert torch.equal(cast.cos, cos) and torch.equal(cast.sin, sin) and len(list(cast.buffers())) == 2
    moved = cast.to("meta", dtype)
    assert moved.cos.is_meta and moved.sin.is_meta and moved.cos.dtype == torch.float32


@pytest.mark.parametrize("grid", [(4, 4), (6, 6), (3, 3), (2, 7), (9, 1)])
def test_positions_are_interpolated_as_clips(grid):
    theirs = CLIPVisionEmbeddings(CLIPVisionConfig(hidden_size=12, image_size=16, patch_size=4))
    tokens = torch.zeros(1, 1 + grid[0] * grid[1], 12)
    expected = theirs.interpolate_pos_encoding(tokens, 4 * grid[0], 4 * grid[1])[0, 1:]
    weight = theirs.position_embedding.weight
    positions = weight.detach()[1:].requires_grad_()
    ours = resize_positions(positions, (4, 4), grid)
    assert torch.equal(ours, expected)
    ours.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(positions.grad, weight.grad[1:])


def test_interpolated_positions_keep_the_dtype():
    positions = torch.randn(16, 6, dtype=torch.bfloat16)
    expected = resize_positions(positions.float(), (4, 4), (2, 7)).bfloat16()
    assert torch.equal(resize_positions(positions, (4, 4), (2, 7)), expected)


def test_blocks_are_compiled_for_any_number_of_grids():
    """Once for the first grid and once for all others: after eight times PyTorch compiles no more."""
    blocks, counter = Blocks(TextConfig(12, 20, 1, 3)), CompileCounter()
    for block in blocks.layers:
        block.compile(backend=counter)
    rotary = GridRotary(4, (2, 2))
    for grid in [(2, 2), (2, 3), (3, 2), (4, 4), (5, 2), (2, 2), (6, 6)]:
        blocks(torch.randn(2, grid[0] * grid[1], 12), rotary.at(grid).tables)
    assert counter.frame_count == 2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_attention_keeps_the_precision(dtype, tolerance):
    q, k, v = torch.randn(3, 2, 3, 5, 4, dtype=torch.float64)
    expected = (q @ k.mT / 2).softmax(-1) @ v
    result = attend(q.to(dtype), k.to(dtype), v.to(dtype), None, False)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance)


def test_subln_norms_the_heads_together():
    """One LayerNorm over the concatenated heads, and one inside the MLP: docs/paper.md section 1."""
    config = TextConfig(hidden_size=12, num_attention_heads=3, intermediate_size=20, subln=True, swiglu=True)
    attention, mlp, x = Attention(config), SwiGLU(config), torch.randn(2, 5, 12)
    assert attention.inner_attn_ln.normalized_shape == (12,) and mlp.ffn_ln.normalized_shape == (20,)
    q, k, v = (p(x).view(2, 5, 3, 4) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    weights = torch.einsum("bihd,bjhd->bhij", q, k).div(2).softmax(-1)
    heads = torch.einsum("bhij,bjhd->bihd", weights, v).reshape(2, 5, 12)
    expected = attention.out_proj(attention.inner_attn_ln(heads))
    torch.testing.assert_close(attention(x, None, None, False), expected)
    gate = torch.nn.functional.silu(mlp.w1(x)) * mlp.w2(x)
    torch.testing.assert_close(mlp(x), mlp.w3(mlp.ffn_ln(gate)))


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_eps_is_of_every_layer_norm(eps):
    block = Block(TextConfig(subln=True, swiglu=True, layer_norm_eps=eps))
    norms = [m for m in block.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 4 and {norm.eps for norm in norms} == {eps}


def test_to_sphere_is_float32_at_least():
    for dtype, expected in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        unit = to_sphere(torch.randn(3, 7).to(dtype))
        assert unit.dtype == expected
        torch.testing.assert_close(unit.norm(dim=-1), torch.ones(3, dtype=expected))


def test_rotary_tables_are_filled_after_to_empty():
    with torch.device("meta"):
        rotary = GridRotary(8, (2, 3))
    wanted = [table.clone() for table in rotary.tables]
    for table in rotary.tables:
        table.fill_(torch.nan)
    rotary.to("meta").to_empty(device="cpu")
    assert all(map(torch.equal, rotary.tables, wanted))
