"""Philox4x32-10 dropout masks in plain PyTorch: what every kernel reproduces bit for bit.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

Our choice is the counter's layout: feature ``i`` of token ``t`` under expert ``e`` reads 16 bits of

    philox4x32_10(key=(seed low, seed high), counter=(i // 8, t low, e, t high))

namely the low half (``i`` even) or the high half (``i`` odd) of output word ``(i % 8) // 2``.  One
call serves eight neighbouring features, which is one 16-byte load of a 16-bit row.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW32 = 0xFFFFFFFF


def _mul_hi_lo(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``multiplier * x`` for 32-bit values kept in int64."""
    # int64 has no unsigned product: split x so that no partial product reaches bit 63.
    low = multiplier * (x & 0xFFFF)
    high = multiplier * (x >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32.

    Args:
        seed: int64, one element; its low and high 32 bits are the key.
        counter: four int64 tensors that broadcast together, values in [0, 2**32).

    Returns:
        Four int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _LOW32, (seed >> 32) & _LOW32
    for _ in range(10):
        high0, low0 = _mul_hi_lo(_MULTIPLIERS[0], c0)
        high1, low1 = _mul_hi_lo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW32, (k1 + _WEYL[1]) & _LOW32
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, tokens: int, features: int, p: float, expert: int = 0) -> Tensor:
    """Which inputs dropout keeps.

    Args:
        seed: int64, one element.
        tokens, features: shape of the mask.
        p: probability of dropping, in [0, 1); resolved to multiples of 2**-16.
        expert: index of the mask; 0 for one mask per token, the expert for a mask of its own.

    Returns:
        bool ``[tokens, features]``; True keeps.
    """
    device = seed.device
    groups = (features + 7) // 8
    group = torch.arange(groups, device=device)[None, :]
    token = torch.arange(tokens, device=device)[:, None]
    e = torch.full((), expert, dtype=torch.int64, device=device)
    words = philox4x32(seed.reshape(()), (group, token & _LOW32, e, token >> 32))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    bits = torch.stack(halves, dim=-1).reshape(tokens, groups * 8)[:, :features]
    return bits >= dropout_threshold(p)


def dropout_threshold(p: float) -> int:
    """Drop where the 16 random bits are below this."""
    return int(p * 65536 + 0.5)
