"""Codes, token ids, sub-tokens: integer packing and nothing else.

A *code* is a vector of L signs (±1/√L). Its *token* is the integer whose binary digits are those signs,
the first one the most significant; zero counts as negative. Nothing here ever passes through a float, so
code → token → code is the identity for every width from 1 to 63. (The released QLIP code sums its 28-bit
ids in float32, which holds 24 bits: only about a fifth of them came back.)
"""

import torch
from torch import Tensor

from qlip.errors import InputError

MAX_BITS = 63  # what an int64 holds without its sign


def codes_to_tokens(codes: Tensor) -> Tensor:
    """Pack signs into integers.

    Args:
        codes: (..., L) of any floating or integer dtype; positive is 1, zero and negative are 0.

    Returns:
        (...) int64 in [0, 2^L).

    Raises:
        InputError: L is not between 1 and 63.
    """
    return pack(codes > 0)


def tokens_to_codes(tokens: Tensor, num_bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unpack integers into codes on the unit sphere.

    Args:
        tokens: (...) integers in [0, 2^num_bits).
        num_bits: L, 1 to 63.
        dtype: floating dtype of the codes.

    Returns:
        (..., L) of ±1/√L.

    Raises:
        InputError: a token lies outside its range, or is not an integer.
    """
    signs = unpack(tokens, num_bits) * 2 - 1
    return signs.to(dtype) * num_bits**-0.5


def tokens_to_sub_tokens(tokens: Tensor, num_bits: int, bits: int) -> Tensor:
    """Cut each token into words of a smaller vocabulary, the most significant word first.

    Args:
        tokens: (B, N) integers in [0, 2^num_bits).
        num_bits: L, the width of a token.
        bits: the width of a sub-token; divides L.

    Returns:
        (B, N, L/bits) int64 in [0, 2^bits).

    Raises:
        InputError: `bits` does not divide L, or a token is out of range.
    """
    _check_sub_token_bits(num_bits, bits)
    return pack(unpack(tokens, num_bits).unflatten(-1, (num_bits // bits, bits)))


def sub_tokens_to_tokens(sub_tokens: Tensor, num_bits: int, bits: int) -> Tensor:
    """Join sub-tokens again: the inverse of `tokens_to_sub_tokens`.

    Args:
        sub_tokens: (B, N, L/bits) integers in [0, 2^bits).
        num_bits: L, the width of a token.
        bits: the width of a sub-token; divides L.

    Returns:
        (B, N) int64 in [0, 2^num_bits).

    Raises:
        InputError: the last dimension is not L/bits, or a sub-token is out of range.
    """
    _check_sub_token_bits(num_bits, bits)
    if sub_tokens.shape[-1] != num_bits // bits:
        raise InputError(
            f"sub_tokens have {sub_tokens.shape[-1]} words a position, but {num_bits} bits in words of "
            f"{bits} make {num_bits // bits}: pass the `bits` they were cut with"
        )
    return pack(unpack(sub_tokens, bits).flatten(-2))


def pack(bits: Tensor) -> Tensor:
    """(..., L) booleans or 0/1 integers → (...) int64, first bit most significant."""
    num_bits = bits.shape[-1]
    _check_width(num_bits)
    return (bits.long() << _shifts(num_bits, bits.device)).sum(-1)


def unpack(tokens: Tensor, num_bits: int) -> Tensor:
    """(...) integers → (..., L) int64 of 0 and 1, first bit most significant."""
    _check_width(num_bits)
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise InputError(f"tokens are {tokens.dtype}, not integers: keep ids in an integer dtype")
    tokens = tokens.long()
    if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >> num_bits):
        raise InputError(
            f"tokens range over [{int(tokens.min())}, {int(tokens.max())}], outside [0, 2^{num_bits}): "
            "these ids are of another tokenizer"
        )
    return (tokens[..., None] >> _shifts(num_bits, tokens.device)) & 1


def _shifts(num_bits: int, device: torch.device) -> Tensor:
    return torch.arange(num_bits - 1, -1, -1, device=device)


def _check_width(num_bits: int) -> None:
    if not 1 <= num_bits <= MAX_BITS:
        raise InputError(f"a token of {num_bits} bits does not fit an int64: use 1 to {MAX_BITS} bits")


def _check_sub_token_bits(num_bits: int, bits: int) -> None:
    if bits < 1 or num_bits % bits:
        divisors = [d for d in range(1, num_bits + 1) if num_bits % d == 0]
        raise InputError(f"bits={bits} does not divide the token's {num_bits} bits: use one of {divisors}")


def check_bits(num_bits: int, bits: int) -> None:
    """Whether tokens can be cut into sub-tokens of a width.

    Raises:
        InputError: they cannot, or its vocabulary is too large.
    """
    if not 1 <= num_bits <= 63:
        raise InputError(f"num_bits is {num_bits}: a token has 1 to 63")
    if bits < 1 or num_bits % bits:
        raise InputError(f"bits {bits} does not divide the {num_bits} bits of a token")
    if bits > 20:
        raise InputError(f"bits {bits} makes a vocabulary of 2^{bits}: use at most 20")
