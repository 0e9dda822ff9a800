"""Codes, tokens and sub-tokens against Python's own integers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlip.bits import codes_to_tokens, pack, sub_tokens_to_tokens, tokens_to_codes, tokens_to_sub_tokens, unpack
from qlip.errors import InputError

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
widths = st.integers(1, 63)


@st.composite
def tokens_of_a_width(draw):
    """A width, and a few ids of it, the extremes among them."""
    width = draw(widths)
    ids = draw(st.lists(st.integers(0, 2**width - 1), max_size=6))
    return width, torch.tensor([0, 2**width - 1, *ids])


@given(tokens_of_a_width(), st.sampled_from(FLOATS))
def test_tokens_come_back_from_codes_of_any_width_and_dtype(given, dtype):
    width, tokens = given
    codes = tokens_to_codes(tokens, width, dtype)
    assert codes.dtype == dtype and codes.shape == (*tokens.shape, width)
    assert torch.equal(codes_to_tokens(codes), tokens)


@given(tokens_of_a_width())
def test_the_first_bit_is_the_most_significant(given):
    width, tokens = given
    for token, code in zip(tokens.tolist(), tokens_to_codes(tokens, width), strict=True):
        assert "".join("1" if x > 0 else "0" for x in code) == f"{token:0{width}b}"


@given(st.lists(st.floats(width=32), min_size=1, max_size=63))
def test_only_positive_is_one(values):
    expected = int("".join("1" if x > 0 else "0" for x in values), 2)
    assert codes_to_tokens(torch.tensor(values)).item() == expected


def test_zero_counts_as_negative_and_so_does_nan():
    assert codes_to_tokens(torch.tensor([0.0, -0.0, float("nan"), 1e-30])).item() == 1


@given(tokens_of_a_width())
def test_sub_tokens_of_every_divisor_come_back(given):
    width, tokens = given
    for bits in (d for d in range(1, width + 1) if width % d == 0):
        words = tokens_to_sub_tokens(tokens[None], width, bits)
        assert words.shape == (1, len(tokens), width // bits) and words.dtype == torch.int64
        for token, word in zip(tokens.tolist(), words[0].tolist(), strict=True):
            assert "".join(f"{w:0{bits}b}" for w in word) == f"{token:0{width}b}"
        assert torch.equal(sub_tokens_to_tokens(words, width, bits)[0], tokens)


@pytest.mark.parametrize("width", [1, 12, 28, 62, 63])
def test_codes_are_unit_vectors(width):
    codes = tokens_to_codes(torch.tensor([0, 2**width - 1]), width)
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(2))
    assert torch.equal(codes[0], -codes[1])


def test_28_bits_survive_where_float32_would_lose_them():
    tokens = torch.tensor([2**24 + 1, 2**28 - 1, 2**27 + 3])
    assert not torch.equal(tokens.float().long(), tokens)
    assert torch.equal(codes_to_tokens(tokens_to_codes(tokens, 28)), tokens)


def test_63_bits_fill_an_int64():
    largest = torch.tensor(2**63 - 1)
    assert codes_to_tokens(torch.ones(63)).item() == 2**63 - 1
    assert unpack(largest, 63).sum().item() == 63
    assert tokens_to_sub_tokens(largest.view(1, 1), 63, 21).tolist() == [[[2**21 - 1] * 3]]


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.uint32, torch.int64, torch.uint64, torch.uint16, torch.uint8]
)
def test_tokens_of_any_integer_dtype(dtype):
    codes = tokens_to_codes(torch.tensor([0, 5, 255]).to(dtype), 28)
    assert codes_to_tokens(codes).tolist() == [0, 5, 255]


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3, 4)])
def test_any_leading_shape(shape):
    tokens = torch.randint(0, 2**28, shape)
    assert tokens_to_codes(tokens, 28).shape == (*shape, 28)
    assert torch.equal(codes_to_tokens(tokens_to_codes(tokens, 28)), tokens)


@pytest.mark.parametrize("token", [-1, 2**28, 2**62])
def test_tokens_out_of_range_are_of_another_tokenizer(token):
    with pytest.raises(InputError, match=r"outside \[0, 2\^28\)"):
        tokens_to_codes(torch.tensor([0, token]), 28)


def test_a_uint64_beyond_int64_is_out_of_range():
    with pytest.raises(InputError, match="outside"):
        tokens_to_codes(torch.tensor([2**63 + 5], dtype=torch.uint64), 63)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex64, torch.bool])
def test_tokens_must_be_integers(dtype):
    with pytest.raises(InputError, match="not integers"):
        tokens_to_codes(torch.zeros(3, dtype=dtype), 28)


@pytest.mark.parametrize("width", [0, 64, -1])
def test_widths_that_do_not_fit(width):
    with pytest.raises(InputError, match="1 to 63"):
        tokens_to_codes(torch.tensor([0]), width)
    with pytest.raises(InputError, match="1 to 63"):
        pack(torch.zeros(2, max(width, 0), dtype=torch.bool))


@pytest.mark.parametrize("bits", [0, -7, 5, 56])
def test_sub_token_widths_must_divide(bits):
    with pytest.raises(InputError, match=rf"bits={bits} does not divide .* 28 bits: use one of .*14"):
        tokens_to_sub_tokens(torch.zeros(1, 2, dtype=torch.int64), 28, bits)
    with pytest.raises(InputError, match="does not divide"):
        sub_tokens_to_tokens(torch.zeros(1, 2, 2, dtype=torch.int64), 28, bits)


def test_sub_tokens_of_another_cut():
    words = tokens_to_sub_tokens(torch.zeros(1, 2, dtype=torch.int64), 28, 14)
    with pytest.raises(InputError, match="2 words a position"):
        sub_tokens_to_tokens(words, 28, 7)
    with pytest.raises(InputError, match="outside"):
        sub_tokens_to_tokens(words + 2**14, 28, 14)
