"""Intuition-MoR1E: a grid of rank-1 experts on a frozen linear (2404.08985)."""

import math

import torch
from torch import Tensor, nn

from .. import functional, reference
from ..intuition import scores_now
from .base import AdapterLinear
from .checks import check_choice, check_count


class MoR1ELinear(AdapterLinear):
    """``y = base(x) + σ(100 β̂) H' B``: rows of A and of B, every pair of them an expert, fused.

    The gate of a token sums a softmax router and the *intuition*: scores from outside, usually how
    near the instruction is to each cluster of instructions (:mod:`moelora_ops.intuition`).  The
    formula is in :func:`moelora_ops.functional.mor1e`.

    Args:
        base: the frozen layer, see :class:`AdapterLinear`.
        rank_down: r1 >= 1, rows of A.
        rank_up: r2 >= 1, rows of B.
        token_scale, task_scale: of the router's and of the intuition's part of the gate; 32 and 4
            are fixed numbers in the authors' code.
        mode: ``"grid"``, r1 r2 experts (default, 4 x 8 in the released configuration); or
            ``"rank1"``, the released alternative: r1 = r2 experts, row i of A with row i of B.
        device, dtype: of the new parameters; by default those of the base.

    Parameters:
        lora_down: ``[r1, in_features]``, Kaiming-uniform(a=√5).
        lora_up: ``[r2, out_features]``, zero, so that y = base(x) at first.
        router: ``[G, in_features]`` for G experts, zero, no bias.
        omega, beta: ω̂ and β̂, ``[1]``, zero.  ω = σ(100 ω̂) shares the gate between router (ω) and
            intuition (1 - ω), σ(100 β̂) scales the experts.  The factor 100 (the authors' code)
            makes them learn 100 times as fast.

    The initialisation is that of the authors' code.  The state_dict is that of
    :class:`moelora_ops.reference.MoR1ELinear`.

    Shapes: x ``[..., in_features]`` to y ``[..., out_features]``.

    Raises:
        TypeError, ValueError: an argument is out of range; the message names it.
    """

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
        check_arguments(rank_down, rank_up, token_scale, task_scale, mode)
        super().__init__(base, device, dtype)
        self.rank_down, self.rank_up, self.mode = rank_down, rank_up, mode
        self.token_scale, self.task_scale = token_scale, task_scale
        self.num_experts = count_experts(rank_down, rank_up, mode)
        self.lora_down = self._new_parameter(rank_down, self.in_features)
        self.lora_up = self._new_parameter(rank_up, self.out_features)
        self.router = self._new_parameter(self.num_experts, self.in_features)
        self.omega, self.beta = self._new_parameter(1), self._new_parameter(1)
        self.ambient_scores = reference.AmbientScores()
        self.had_scores = False  # ever, outside of compiled code
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the experts and the router anew; the layer is then equal to its base."""
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))
        for parameter in (self.lora_up, self.router, self.omega, self.beta):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, intuition: Tensor | None = None) -> Tensor:
        """x ``[..., in_features]`` to y ``[..., out_features]``.

        Args:
            x: the input.
            intuition: scores, ``[batch, G]`` for x ``[batch, length, in_features]`` or ``[..., G]``
                with x's leading dimensions; by default those of the ``with
                moelora_ops.intuition(model, scores)`` block around this call, outside of blocks
                zeros.
        """
        scores = scores_now(self) if intuition is None else reference.Scores(intuition)
        return functional.mor1e(
            x, lora_down=self.lora_down, lora_up=self.lora_up, router=self.router,
            omega=self.omega, beta=self.beta, intuition=scores.values,
            token_scale=self.token_scale, task_scale=self.task_scale, mode=self.mode,
            row_map=scores.row_map, **self.base_arguments(x),
        )  # fmt: skip

    @classmethod
    def from_reference(cls, layer: reference.MoR1ELinear) -> "MoR1ELinear":
        """The fused layer that shares `layer`'s base and parameters."""
        fused = cls(
            layer.base, layer.rank_down, layer.rank_up, layer.token_scale, layer.task_scale,
            layer.mode, device="meta",
        )  # fmt: skip
        for name in ("lora_down", "lora_up", "router", "omega", "beta"):
            setattr(fused, name, getattr(layer, name))
        return fused.train(layer.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank_down={self.rank_down}, rank_up={self.rank_up}, mode={self.mode!r}, "
            f"token_scale={self.token_scale}, task_scale={self.task_scale}"
        )


def count_experts(rank_down: int, rank_up: int, mode: str) -> int:
    """G: the width of the router and of the intuition."""
    return rank_down * rank_up if mode == "grid" else rank_down


def check_arguments(rank_down, rank_up, token_scale, task_scale, mode) -> None:
    """The constructor's contract; a whole model's configuration is checked by it as well."""
    check_count("rank_down", rank_down)
    check_count("rank_up", rank_up)
    functional.check_finite("token_scale", token_scale)
    functional.check_finite("task_scale", task_scale)
    check_choice("mode", mode, reference.MOR1E_MODES)
    if mode == "rank1" and rank_up != rank_down:
        raise ValueError(
            f"rank_up: wanted {rank_down} like rank_down, as mode is 'rank1', got {rank_up}"
        )
