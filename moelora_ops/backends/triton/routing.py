"""Routing of the topk mix, on a tile [BT, EP] of logits: which experts, and how much of each.

Row mathematics as in csrc/mix/topk.h.  EP is a power of two that holds E experts.
"""

import triton
import triton.language as tl

from .device import NO_KEY, shares, softmax_backward


@triton.jit
def take_largest(keys):
    """Index [BT] of the largest of keys [BT, EP], the lower of equal ones; and the keys but it."""
    largest = tl.argmax(keys, 1, tie_break_left=True)
    taken = tl.arange(0, keys.shape[1])[None, :] == largest[:, None]
    return largest, tl.where(taken, NO_KEY, keys)


@triton.jit
def last_choice(keys, E: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr):
    """Index [BT] of the k-th largest of keys [BT, EP]; ties go to the lower index."""
    last = tl.full([keys.shape[0]], E - 1, tl.int32)
    if TOP_K < E:
        for _ in range(TOP_K):
            last, keys = take_largest(keys)
    return last


@triton.jit
def choices(keys, last, E: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr):
    """bool [BT, EP]: the columns up to the k-th largest, which is column `last` [BT]."""
    if TOP_K == E:
        return keys != NO_KEY
    e = tl.arange(0, EP)[None, :]
    least = tl.max(tl.where(e == last[:, None], keys, NO_KEY), 1)[:, None]
    return (keys > least) | ((keys == least) & (e <= last[:, None]))


@triton.jit
def chosen_shares(p, chosen, RENORMALIZE: tl.constexpr):
    """The weights [BT, EP]: zero for what is not chosen."""
    among = tl.where(chosen, p, 0.0)
    return tl.where(chosen, shares(p, among if RENORMALIZE else p), 0.0)


@triton.jit
def logit_gradients(
    p, weights, dweights, dprob_sums, E: tl.constexpr, RENORMALIZE: tl.constexpr
):  # fmt: skip
    """Gradients of the logits [BT, EP].

    Args:
        p: :func:`exponentials` of the logits.
        weights, dweights: see :func:`chosen_shares`; zero for what is not chosen.
        dprob_sums: [E] or None.
    """
    # Renormalised weights are a softmax among the chosen; others are probabilities of the full one.
    out, dprobs = tl.zeros_like(p), dweights
    if RENORMALIZE:
        out, dprobs = softmax_backward(weights, dweights), tl.zeros_like(p)
    if dprob_sums is not None:
        e = tl.arange(0, p.shape[1])
        dprobs += tl.load(dprob_sums + e, mask=e < E, other=0.0)[None, :]
    if dprob_sums is not None or not RENORMALIZE:
        out += softmax_backward(shares(p, p), dprobs)
    return out


@triton.jit
def store_prob_sums(prob_sums, p, exists, tile, E: tl.constexpr, writes=True):
    """Row `tile` of prob_sums [tiles, E]: the softmax summed over the tile's tokens that exist.

    Nothing is stored unless `writes`.
    """
    e = tl.arange(0, p.shape[1])
    probs = tl.where(exists[:, None], shares(p, p), 0.0)
    tl.store(prob_sums + tile * E + e, tl.sum(probs, 0), mask=(e < E) & writes)


@triton.jit
def sum_tiles(
    values, tiles, E: tl.constexpr, EP: tl.constexpr, BG: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Sum [EP] in DTYPE of values [tiles, E], BG rows at a time."""
    e, g = tl.arange(0, EP), tl.arange(0, BG).to(tl.int64)
    total = tl.zeros([EP], DTYPE)
    for g0 in range(0, tiles, BG):
        mask = (g0 + g < tiles)[:, None] & (e < E)[None, :]
        at = values + (g0 + g)[:, None] * E + e[None, :]
        total += tl.sum(tl.load(at, mask=mask, other=0), 0)
    return total
