"""OrchMoE's task router: which abstract tasks a sequence belongs to (2401.10559)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from .checks import check_bool, check_count

_EPSILON = 1e-6  # in a root mean square


class TaskRouter(nn.Module):
    """Which abstract tasks a sequence belongs to: ``softmax(mean_t(X̂) Wᵀ + b)`` (OrchMoE).

    ``X̂ = softmax(X Xᵀ/√d) X + X`` and the linear are quoted from the paper (2401.10559); the mean
    over tokens and the softmax are our reading, and so is the causal form.

    Args:
        in_features: d, width of the hidden states X.
        num_tasks: number of abstract tasks.
        causal: attend and average over the positions up to each one, which gives tasks per token;
            otherwise over the whole sequence.
        normalize: divide each hidden state by its root mean square first (our choice; the quoted
            formula does not).  In language models single tokens of a hundredfold norm, such as the
            first one, otherwise are all that attention and mean see: in SmolLM2-135M the tasks were
            the same for every input from layer 5 on.
        device, dtype: of the parameters.

    Parameters:
        weight, bias: ``[num_tasks, in_features]`` and ``[num_tasks]``, initialised like
            ``nn.Linear`` (our choice).
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        causal: bool = False,
        normalize: bool = True,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_count("in_features", in_features)
        check_count("num_tasks", num_tasks)
        check_bool("causal", causal)
        check_bool("normalize", normalize)
        self.in_features, self.num_tasks = in_features, num_tasks
        self.causal, self.normalize = causal, normalize
        self.weight = nn.Parameter(torch.empty(num_tasks, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_tasks, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Both uniform within ±1/√d."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Probabilities of the tasks, see :meth:`extend`."""
        return self.extend(x, mask)[0]

    def extend(
        self, x: Tensor, mask: Tensor | None = None, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Tasks of `x` behind earlier positions, and what `x` adds to the past.

        Args:
            x: ``[batch, length, d]``.
            mask: ``[batch, past + length]``, nonzero on real tokens; None if all are.
            past: X (normalised, if so) and X̂ of earlier positions, each ``[batch, past, d]``;
                causal only.

        Returns:
            Probabilities, at least float32, ``[batch, num_tasks]``, or per token
            ``[batch, length, num_tasks]`` if causal; and X and X̂ of these positions, each
            ``[batch, length, d]``.  Where nothing real is to be seen the mean is 0.

        Raises:
            ValueError: a shape does not fit; the message names the argument.
        """
        if x.dim() != 3 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: wanted shape [batch, length, {self.in_features}], got {list(x.shape)}"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.normalize:
            square = x.to(wide).square().mean(-1, keepdim=True)
            x = (x * torch.rsqrt(square + _EPSILON)).to(x.dtype)
        keys = x if past is None else _behind(past[0], x)
        if mask is not None:
            if mask.shape != keys.shape[:2]:
                raise ValueError(
                    f"mask: wanted shape {list(keys.shape[:2])}, got {list(mask.shape)}"
                )
            mask = mask.to(device=x.device) != 0
        attended = self._attend(x, keys, mask) + x
        seen = attended if past is None else _behind(past[1], attended)
        real = torch.ones_like(seen[..., 0], dtype=torch.bool) if mask is None else mask
        real = real.unsqueeze(-1)
        terms = seen.to(wide).where(real, 0)
        if self.causal:
            pooled = terms.cumsum(1) / real.cumsum(1).clamp(min=1)
            pooled = pooled[:, keys.shape[1] - x.shape[1] :]
        else:
            pooled = terms.sum(1) / real.sum(1).clamp(min=1)
        with reference.no_autocast(x.device.type):  # the softmax's logits stay wide
            logits = F.linear(pooled, self.weight.to(wide), self.bias.to(wide))
        return logits.softmax(-1), (x, attended)

    def _attend(self, x: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        new, total = x.shape[1], keys.shape[1]
        if mask is None and (not self.causal or new == total):
            return _attention(x, keys, is_causal=self.causal)
        allowed = torch.ones(new, total, dtype=torch.bool, device=x.device)
        own = allowed.triu(total - new).tril(total - new)
        if self.causal:
            allowed = allowed.tril(total - new)
        if mask is not None:
            # Padding sees itself: a softmax over nothing would be NaN.  It is left out of the mean.
            allowed = (allowed & mask.unsqueeze(1)) | own
            allowed = allowed.unsqueeze(1)
        return _attention(x, keys, attn_mask=allowed)

    def extra_repr(self) -> str:
        shown = ("in_features", "num_tasks", "causal", "normalize")
        return ", ".join(f"{name}={getattr(self, name)}" for name in shown)


def _attention(x: Tensor, keys: Tensor, **options) -> Tensor:
    """softmax(x keysᵀ/√d) keys, with one head."""
    keys = keys.unsqueeze(1)
    return F.scaled_dot_product_attention(x.unsqueeze(1), keys, keys, **options).squeeze(1)


def _behind(past: Tensor, present: Tensor) -> Tensor:
    """Both; autocast refuses to join 16-bit tensors of another dtype than its own."""
    with reference.no_autocast(present.device.type):
        return torch.cat([past, present], 1)
