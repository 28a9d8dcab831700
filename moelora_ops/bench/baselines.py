"""Plain PyTorch layers to measure against, as good as plain PyTorch allows.

They take the constructor arguments of the fused layer and name their parameters alike, and
``from_reference`` shares the parameters of any layer of the method.  Dropout is left out: every
variant is timed and checked on the same numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import nn


class _PlainMoLALinear(nn.MoLALinear):
    # Logits in float32 like the kernels: logits rounded to 16 bits choose other experts now and
    # then, which is another function and no baseline for errors.  It costs a float32 copy of x,
    # hence the fast variant below.
    float32_logits = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.dropout:
            raise ValueError(f"dropout: the baselines have none, got {self.dropout!r}")

    def _logits(self, tokens: Tensor) -> Tensor:
        """``[T, E]`` in float32, or wider if the tokens are."""
        wide = torch.promote_types(tokens.dtype, torch.float32)
        if not self.float32_logits:
            return F.linear(tokens, self.router).to(wide)
        return F.linear(tokens.to(wide), self.router.to(wide))

    def _top_k(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts ``[T, k]`` of each token."""
        if self.renormalize:
            # The softmax over the chosen logits: the same numbers in fewer kernels.
            chosen, selected = logits.topk(self.top_k)
            return chosen.softmax(-1), selected
        return logits.softmax(-1).topk(self.top_k)


class StackedMoLALinear(_PlainMoLALinear):
    """All experts as one wide LoRA whose columns the gate scales: the baseline that counts.

    The base must not keep its output for its backward (``nn.Linear`` does not): the experts are
    added in place.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., K]`` to y ``[..., N]``."""
        tokens = x.reshape(-1, self.in_features)
        y = self.base(tokens)
        down, up = self.lora_down.flatten(0, 1), self.lora_up.flatten(0, 1)
        one_dtype = not self.float32_logits or x.dtype.itemsize >= 4
        # Below 32 tokens copying the rows together costs more than a second product.
        if one_dtype and len(tokens) >= 32:
            both = F.linear(tokens, torch.cat([down, self.router]))
            hidden, logits = both.split([len(down), self.num_experts], -1)
            logits = logits.to(torch.promote_types(x.dtype, torch.float32))
        else:
            hidden, logits = F.linear(tokens, down), self._logits(tokens)
        weights, selected = self._top_k(logits)
        gate = torch.zeros_like(logits).scatter(-1, selected, weights).to(x.dtype)
        hidden = hidden.unflatten(-1, (self.num_experts, self.rank)) * gate.unsqueeze(-1)
        y = y.addmm_(hidden.flatten(1), up, alpha=self.alpha / self.rank)
        return y.view(*x.shape[:-1], self.out_features)


class FastStackedMoLALinear(StackedMoLALinear):
    """Logits rounded to x's dtype: faster in 16 bits, chooses other experts on near ties."""

    float32_logits = False


class GroupedMoLALinear(_PlainMoLALinear):
    """(token, expert) pairs sorted by expert, and all experts' products in one grouped GEMM.

    With PyTorch's own kernel (``torch.nn.functional.grouped_mm``), which wants bfloat16 rows of
    whole 16 bytes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., K]`` to y ``[..., N]``."""
        tokens = x.reshape(-1, self.in_features)
        weights, selected = self._top_k(self._logits(tokens))
        chosen, order = selected.flatten().sort(stable=True)
        experts = torch.arange(self.num_experts, device=x.device)
        ends = torch.searchsorted(chosen, experts, right=True, out_int32=True)
        rows = order // self.top_k
        hidden = F.grouped_mm(tokens[rows], self.lora_down.mT, offs=ends)
        scales = weights.flatten()[order].unsqueeze(-1) * (self.alpha / self.rank)
        output = F.grouped_mm((hidden * scales).to(x.dtype), self.lora_up, offs=ends)
        y = self.base(tokens).index_add_(0, rows, output)
        return y.view(*x.shape[:-1], self.out_features)


class ExpertLoopMoLALinear(_PlainMoLALinear):
    """A loop over the experts that gathers each one's tokens, in the manner of the papers' code."""

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., K]`` to y ``[..., N]``."""
        tokens = x.reshape(-1, self.in_features)
        weights, selected = self._top_k(self._logits(tokens))
        weights = weights.to(x.dtype)
        chosen = F.one_hot(selected, self.num_experts).permute(2, 1, 0)  # [E, k, T]
        mixture = tokens.new_zeros(len(tokens), self.out_features)
        for e in range(self.num_experts):
            slot, rows = torch.where(chosen[e])
            hidden = F.linear(tokens[rows], self.lora_down[e])
            output = hidden @ self.lora_up[e] * (self.alpha / self.rank)
            mixture.index_add_(0, rows, output * weights[rows, slot].unsqueeze(-1))
        y = self.base(tokens) + mixture
        return y.view(*x.shape[:-1], self.out_features)


class TouchedLinear(torch.nn.Module):
    """A frozen linear whose x is read and y rewritten after its product, and no adapter.

    Backward dy is read and dx rewritten.  That much memory any adapter moves that is not fused into
    the library's GEMM, however little it computes.
    """

    def __init__(self, base: torch.nn.Module):
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., K]`` to base(x) ``[..., N]``."""
        x = _RewriteGradient.apply(x)
        return _Touch.apply(x, self.base(x))


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _read(t: Tensor) -> None:
    if t.numel():
        t.view(_BITS[t.itemsize]).amax()


def _rewrite(t: Tensor) -> None:
    t.view(_BITS[t.itemsize]).bitwise_xor_(0)


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        _read(x)
        _rewrite(y)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[None, Tensor]:
        _read(dy)
        return None, dy


class _RewriteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx: Tensor) -> Tensor:
        _rewrite(dx)
        return dx
