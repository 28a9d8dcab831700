"""PEMT's stage 1: one expert beside a frozen linear, and what it hands to stage 2 (2402.15082)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import functional, reference
from ..reference import Expert
from .base import AdapterLinear, init_stack
from .checks import check_choice, check_count
from .pemt_adapter import one_per_token, required_ffn_input, share_parameters

KINDS = ("lora", "adapter")
INITS = ("kaiming", "zero")


class PEMTSourceLinear(AdapterLinear):
    """Stage 1: one expert beside a frozen linear, trained on a source task.

    ``"lora"``: ``y = base(x) + alpha/rank B A x``, PEMT's released experts (rank 64, scale 1).
    ``"adapter"``: ``y = base(x) + U gelu_tanh(D x + b_D) + b_U + v``, v the feed-forward's input.

    Args:
        base: the frozen layer, W_o of the feed-forward; see :class:`AdapterLinear`.
        rank: of the LoRA, or rows of D.
        alpha: a LoRA is scaled by alpha / rank; an adapter is not scaled.
        kind: ``"lora"`` or ``"adapter"``.
        init: of a LoRA's B: ``"kaiming"`` like A, as in the authors' code (a=√5 is our choice), so
            that the layer does not start as its base; ``"zero"`` as usual elsewhere (our choice).
        device, dtype: of the new parameters; by default those of the base.

    Parameters:
        lora_down, lora_up: A ``[1, rank, in_features]`` and Bᵀ ``[1, rank, out_features]``; of an
            adapter N(0, 0.01²), like the target adapter (our choice).
        down_bias, up_bias: ``[1, rank]`` and ``[1, out_features]`` of an adapter, zero.

    Raises:
        TypeError, ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 64,
        alpha: float = 64.0,
        *,
        kind: str = "lora",
        init: str = "kaiming",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_source_arguments(rank, alpha, kind, init)
        super().__init__(base, device, dtype)
        self.rank, self.alpha, self.kind, self.init = rank, alpha, kind, init
        biased = kind == "adapter"
        self.lora_down = self._new_parameter(1, rank, self.in_features)
        self.lora_up = self._new_parameter(1, rank, self.out_features)
        self.down_bias = self._new_parameter(1, rank) if biased else None
        self.up_bias = self._new_parameter(1, self.out_features) if biased else None
        self.ffn_input: Tensor | None = None  # set by the model's hooks, taken by forward
        self.reset_parameters()

    @property
    def residual(self) -> bool:
        """Whether forward needs the feed-forward's input."""
        return self.kind == "adapter"

    def reset_parameters(self) -> None:
        """Initialise the expert anew."""
        if self.kind == "adapter":
            for weight in (self.lora_down, self.lora_up):
                nn.init.normal_(weight, std=0.01)
            for bias in (self.down_bias, self.up_bias):
                nn.init.zeros_(bias)
            return
        init_stack(self.lora_down, self.in_features)
        if self.init == "kaiming":
            init_stack(self.lora_up, self.rank)
        else:
            nn.init.zeros_(self.lora_up)

    def expert(self) -> Expert:
        """The trained expert as stage 2 takes it: detached, not copied."""
        return source_expert(dict(self.named_parameters()), self.rank, self.alpha, self.kind)

    def forward(self, x: Tensor, ffn_input: Tensor | None = None) -> Tensor:
        """x ``[..., in_features]`` to y ``[..., out_features]``.

        Args:
            x: the feed-forward's inner activation.
            ffn_input: v ``[..., out_features]``, for an adapter; by default what the hooks of
                :func:`moelora_ops.apply` have brought.
        """
        ffn_input, self.ffn_input = self.ffn_input if ffn_input is None else ffn_input, None
        y = functional.gated(
            x,
            lora_down=self.lora_down,
            lora_up=self.lora_up,
            weights=one_per_token(x),
            scale=source_scale(self.rank, self.alpha, self.kind),
            activation="gelu_tanh" if self.residual else None,
            down_bias=self.down_bias,
            up_bias=self.up_bias,
            **self.base_arguments(x),
        )
        return y + required_ffn_input(ffn_input) if self.residual else y

    @classmethod
    def from_reference(cls, layer: reference.PEMTSourceLinear) -> "PEMTSourceLinear":
        """The fused layer that shares `layer`'s base and parameters."""
        fused = cls(
            layer.base, layer.rank, layer.alpha, kind=layer.kind, init=layer.init, device="meta"
        )
        share_parameters(fused, layer, ("lora_down", "lora_up", "down_bias", "up_bias"))
        return fused.train(layer.training)

    def __getstate__(self):
        return {**super().__getstate__(), "ffn_input": None}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"alpha={self.alpha}, kind={self.kind}"
        )


def source_scale(rank: int, alpha: float, kind: str) -> float:
    """s of a source's expert."""
    return 1.0 if kind == "adapter" else alpha / rank


def source_expert(tensors: Mapping[str, Tensor], rank: int, alpha: float, kind: str) -> Expert:
    """The expert of a :class:`PEMTSourceLinear` from its parameters by name, detached."""
    names = ("lora_down", "lora_up", *(("down_bias", "up_bias") if kind == "adapter" else ()))
    down, up, *biases = (tensors[name][0].detach() for name in names)
    return Expert(down, up.T, source_scale(rank, alpha, kind), *biases)


def check_source_arguments(rank, alpha, kind, init) -> None:
    """The contract of :class:`PEMTSourceLinear`'s constructor."""
    check_count("rank", rank)
    functional.check_finite("alpha", alpha)
    check_choice("kind", kind, KINDS)
    check_choice("init", init, INITS)
