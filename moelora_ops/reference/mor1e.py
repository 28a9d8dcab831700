"""Intuition-MoR1E, literally: a grid of rank-1 experts, and a gate with an outside opinion.

Source: 2404.08985 (its second version is named T-REX) and its authors' released code, whose
formula, constants and initialisation this is.  Eager, any dtype up to float64, shares nothing with
the rest of the package.
"""

import math
import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import LooksLikeBase
from .gated import weights_per_token
from .mola import no_autocast

MOR1E_MODES = ("grid", "rank1")


class Scores:
    """What a ``with moelora_ops.intuition(...)`` block says to the layers of a model.

    Attributes:
        values: intuition, or None as outside every block.
        row_map: see :func:`mor1e`.
        first, last: the forward calls that it holds for, by the sequence numbers of their autograd
            nodes, `last` excluded.
        before: in a backward pass that set these scores, those that it found; else None.
    """

    def __init__(self, values: Tensor | None = None, row_map: Tensor | None = None):
        self.values, self.row_map = values, row_map
        self.first, self.last = 0, 0
        self.before: Scores | None = None


NO_SCORES = Scores()


class AmbientScores(threading.local):
    """The :class:`Scores` of a layer in the current thread: those that hold, and the last ones."""

    now = NO_SCORES
    last: Scores | None = None

    def __reduce__(self):
        return AmbientScores, ()  # a copy of a layer is in no block


def mor1e(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_down: Tensor,
    lora_up: Tensor,
    router: Tensor,
    omega: Tensor,
    beta: Tensor,
    intuition: Tensor | None = None,
    token_scale: float = 32.0,
    task_scale: float = 4.0,
    *,
    mode: str = "grid",
    row_map: Tensor | None = None,
    base_output: Tensor | None = None,
) -> Tensor:
    """``y = x Wᵀ + b + σ(100 β̂) H' B`` with, per token,

    ``g = token_scale ω softmax(x Rᵀ) + task_scale (1 − ω) c``, ``ω = σ(100 ω̂)``, ``H = x Aᵀ`` and
    ``H'_j = Σ_i H_i g_(i r2 + j)`` (grid: every row of A with every row of B) or ``H'_j = H_j g_j``
    (rank1: in pairs).

    Args:
        x: ``[..., K]``.
        weight, bias: the frozen linear, ``[N, K]`` and ``[N]`` or None; ignored if `base_output`
            is given.
        lora_down: A, ``[r1, K]``.
        lora_up: B transposed, ``[r2, N]``.
        router: R, ``[G, K]``; G = r1 r2 in grid mode, G = r1 = r2 in rank1 mode.
        omega, beta: ω̂ and β̂, one element each.
        intuition: c: ``[batch, G]`` for x ``[batch, length, K]``, or ``[..., G]`` with x's leading
            dimensions, or ``[rows, G]`` with `row_map`; None means zeros.
        token_scale, task_scale: 32 and 4 in the authors' code, in every mode.
        mode: ``"grid"`` or ``"rank1"``.
        row_map: integers ``[T]`` or x's leading dimensions, the row of `intuition` that each of
            x's T tokens takes.
        base_output: ``[..., N]``, the frozen layer's output if it is not a plain linear.

    Returns:
        y ``[..., N]``.
    """
    tokens = x.reshape(-1, x.shape[-1])
    # At least float32 in the gate, also under autocast.
    wide = torch.promote_types(x.dtype, torch.float32)
    with no_autocast(x.device.type):
        probs = (tokens.to(wide) @ router.to(wide).T).softmax(-1)
    share = torch.sigmoid(100 * omega.to(wide)).reshape(())
    gate = token_scale * share * probs
    if intuition is not None:
        scores = weights_per_token(intuition, x, row_map).to(wide)
        gate = gate + task_scale * (1 - share) * scores

    hidden = tokens @ lora_down.T
    if mode == "grid":
        grid = gate.reshape(-1, len(lora_down), len(lora_up))
        mixed = torch.einsum("ti,tij->tj", hidden.to(wide), grid)
    else:
        mixed = hidden * gate
    output_scale = torch.sigmoid(100 * beta.to(wide)).reshape(())
    experts = output_scale * (mixed.to(x.dtype) @ lora_up)
    if base_output is None:
        y = F.linear(tokens, weight, bias)
    else:
        y = base_output.reshape(-1, base_output.shape[-1])
    y = y + experts.to(y.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


class MoR1ELinear(LooksLikeBase, nn.Module):
    """What :class:`moelora_ops.nn.MoR1ELinear` is checked against: same arguments and state."""

    def __init__(
        self,
        base: nn.Module,
        rank_down: int = 4,
        rank_up: int = 8,
        token_scale: float = 32.0,
        task_scale: float = 4.0,
        mode: str = "grid",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if mode not in MOR1E_MODES:
            raise ValueError(f"mode: wanted one of {MOR1E_MODES}, got {mode!r}")
        if mode == "rank1" and rank_up != rank_down:
            raise ValueError(f"rank_up: wanted rank_down={rank_down} in rank1 mode, got {rank_up}")
        weight = getattr(base, "weight", None)
        if isinstance(weight, Tensor):
            device = weight.device if device is None else device
            dtype = weight.dtype if dtype is None and weight.is_floating_point() else dtype
        like = {"device": device, "dtype": dtype}
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank_down, self.rank_up, self.mode = rank_down, rank_up, mode
        self.token_scale, self.task_scale = token_scale, task_scale
        self.num_experts = rank_down * rank_up if mode == "grid" else rank_down
        self.lora_down = nn.Parameter(torch.empty(rank_down, self.in_features, **like))
        self.lora_up = nn.Parameter(torch.zeros(rank_up, self.out_features, **like))
        self.router = nn.Parameter(torch.zeros(self.num_experts, self.in_features, **like))
        self.omega = nn.Parameter(torch.zeros(1, **like))
        self.beta = nn.Parameter(torch.zeros(1, **like))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))
        self.ambient_scores = AmbientScores()

    def forward(self, x: Tensor, intuition: Tensor | None = None) -> Tensor:
        scores = self.ambient_scores.now if intuition is None else Scores(intuition)
        return mor1e(
            x, None, None, self.lora_down, self.lora_up, self.router, self.omega, self.beta,
            scores.values, self.token_scale, self.task_scale, mode=self.mode,
            row_map=scores.row_map, base_output=self.base(x),
        )  # fmt: skip
