"""The gated mix in the benchmark: experts with given weights per sequence, frozen or trained."""

import copy
import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional, reference
from ..nn import AdapterLinear
from .method import (
    DTYPES,
    LLAMA_7B,
    OURS,
    Floors,
    Method,
    SequenceCase,
    Variant,
    directions,
    generator,
    has_peft,
)
from .numerics import DX, FORWARD, TRAIN


@dataclass(frozen=True)
class GatedCase(SequenceCase):
    """One row of the table: a layer and a number of tokens, in sequences of up to 128."""

    mix = "gated"

    name: str
    dtype: str
    tokens: int
    in_features: int
    out_features: int
    experts: int = 6
    rank: int = 16
    trained: bool = False
    directions: tuple[str, ...] = (FORWARD, TRAIN)

    def __str__(self) -> str:
        return (
            f"T={self.tokens} K={self.in_features} N={self.out_features} E={self.experts}"
            f" r={self.rank}, {'trained' if self.trained else 'frozen'} experts"
        )


def _cases() -> tuple[GatedCase, ...]:
    shapes = (
        ("", {"in_features": 2048, "out_features": 2048}),
        ("trained-", {"in_features": 2048, "out_features": 2048, "trained": True}),
        ("t5-", {"in_features": 3072, "out_features": 768, "rank": 64}),
    )
    # One token's gradients are a few errors repeated over K or N: no measure of an implementation.
    return tuple(
        GatedCase(
            f"{prefix}t{tokens}", dtype, tokens, **shape,
            directions=(FORWARD, TRAIN) if tokens >= 64 else (FORWARD,),
        )
        for (prefix, shape), tokens, dtype in itertools.product(
            shapes, (4096, 1024, 512, 64, 8, 1), ("bf16", "fp32")
        )
    )  # fmt: skip


def _gpu_cases() -> tuple[GatedCase, ...]:
    return tuple(
        GatedCase(
            f"qkvo{suffix}-t{tokens}", "bf16", tokens, *LLAMA_7B["qkvo"], trained=bool(suffix),
            directions=directions(tokens),
        )
        for suffix in ("-trained", "")
        for tokens in (8192, 2048, 512, 32, 1)
    )  # fmt: skip


class GatedLinear(AdapterLinear):
    """Ours: a frozen linear with experts and a weight per sequence, the latter always trained."""

    def __init__(self, base: nn.Module, experts: int, rank: int, batch: int, trained: bool):
        super().__init__(base)
        self.trained = trained
        self.lora_down = self._new_parameter(experts, rank, self.in_features)
        self.lora_up = self._new_parameter(experts, rank, self.out_features)
        self.lora_down.requires_grad_(trained)
        self.lora_up.requires_grad_(trained)
        wide = torch.promote_types(self.lora_down.dtype, torch.float32)
        self.weights = nn.Parameter(torch.empty(batch, experts, dtype=wide))

    def forward(self, x: Tensor) -> Tensor:
        """x ``[batch, length, K]`` to y ``[batch, length, N]``."""
        return functional.gated(
            x, lora_down=self.lora_down, lora_up=self.lora_up, weights=self.weights,
            **self.base_arguments(x),
        )  # fmt: skip

    @classmethod
    def sharing(cls, layer: "GatedLinear") -> "GatedLinear":
        """A layer of this class with `layer`'s parameters."""
        other = copy.copy(layer)
        other.__class__ = cls
        return other


class LiteralGatedLinear(GatedLinear):
    """The reference."""

    def forward(self, x: Tensor) -> Tensor:
        """x ``[batch, length, K]`` to y ``[batch, length, N]``."""
        return reference.gated(
            x, self.base.weight, self.base.bias, self.lora_down, self.lora_up, self.weights
        )


class StackedGatedLinear(GatedLinear):
    """All experts as one wide LoRA whose columns the weights scale: the baseline that counts.

    The mix is in float32: in 16 bits the gradients of the weights lose most of their digits.  The
    base must not keep its output for its backward (``nn.Linear`` does not): the experts are added
    in place.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x ``[batch, length, K]`` to y ``[batch, length, N]``."""
        y = self.base(x)
        hidden = F.linear(x, self.lora_down.flatten(0, 1)).to(self.weights.dtype)
        hidden = hidden.unflatten(-1, self.lora_down.shape[:2]) * self.weights[:, None, :, None]
        mixed = hidden.flatten(2).flatten(0, 1).to(x.dtype)
        y.flatten(0, 1).addmm_(mixed, self.lora_up.flatten(0, 1))
        return y


class ExpertLoopGatedLinear(GatedLinear):
    """In the manner of PEMT's code: a list of outputs, stacked, times the weights."""

    def forward(self, x: Tensor) -> Tensor:
        """x ``[batch, length, K]`` to y ``[batch, length, N]``."""
        pairs = zip(self.lora_down, self.lora_up, strict=True)
        outputs = torch.stack([F.linear(x, down) @ up for down, up in pairs], dim=3)
        return self.base(x) + (outputs @ self.weights.to(x.dtype)[:, None, :, None]).squeeze(3)


class PeftXLoRALinear(GatedLinear):
    """PEFT's X-LoRA layer, run on views of our parameters; it takes weights per token."""

    @classmethod
    def sharing(cls, layer: GatedLinear) -> "PeftXLoRALinear":
        """See :meth:`GatedLinear.sharing`."""
        from peft import LoraConfig, XLoraConfig
        from peft.tuners.lora.layer import Linear
        from peft.tuners.xlora.layer import XLoraLinearLayer

        experts, rank, _ = layer.lora_down.shape
        names, config = [str(e) for e in range(experts)], LoraConfig(r=rank, lora_alpha=rank)
        loras = Linear(copy.copy(layer.base), "0", config=config, r=rank, lora_alpha=rank)
        for name in names[1:]:
            loras.update_layer(name, rank, lora_alpha=rank, config=config)
        loras.set_adapter(names)
        for name, down, up in zip(names, layer.lora_down, layer.lora_up, strict=True):
            for linear, view in ((loras.lora_A[name], down), (loras.lora_B[name], up.T)):
                del linear.weight  # a Parameter, which a view is not
                linear.weight = view
        settings = XLoraConfig(hidden_size=layer.in_features, adapters=dict.fromkeys(names, ""))
        other = super().sharing(layer)
        enabled = SimpleNamespace(disabled=False)
        other.xlora = XLoraLinearLayer(enabled, loras, loras.forward, 0, settings)
        return other

    def forward(self, x: Tensor) -> Tensor:
        """x ``[batch, length, K]`` to y ``[batch, length, N]``."""
        scalings = self.weights.to(x.dtype)[:, None, None].expand(-1, x.shape[1], -1, -1)
        return self.xlora.forward(x, scalings=scalings)


def make_inputs(case: GatedCase, seed: int = 0) -> tuple[GatedLinear, Tensor, Tensor]:
    """The fused layer, x ``[batch, length, K]`` and dy of `case`, all in its dtype.

    Base and experts contribute alike to y, so that an error of either shows.
    """
    dtype = DTYPES[case.dtype]
    random = generator(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=random) * scale

    batch = case.tokens // case.length
    base = nn.Linear(case.in_features, case.out_features, dtype=dtype)
    layer = GatedLinear(base, case.experts, case.rank, batch, case.trained)
    with torch.no_grad():
        base.weight.copy_(normal(*base.weight.shape, scale=case.in_features**-0.5))
        base.bias.copy_(normal(case.out_features))
        layer.lora_down.copy_(normal(*layer.lora_down.shape, scale=case.in_features**-0.5))
        layer.lora_up.copy_(normal(*layer.lora_up.shape, scale=case.rank**-0.5))
        layer.weights.copy_(normal(batch, case.experts).softmax(-1))
    x = normal(batch, case.length, case.in_features).to(dtype)
    return layer, x, normal(batch, case.length, case.out_features).to(dtype)


def reference_layer(layer: GatedLinear, dtype: torch.dtype) -> LiteralGatedLinear:
    """The literal layer with copies of `layer`'s parameters in `dtype`; weights stay wide."""
    literal = LiteralGatedLinear.sharing(copy.deepcopy(layer).to(dtype))
    wide = torch.promote_types(dtype, torch.float32)
    literal.weights = nn.Parameter(layer.weights.detach().to(wide))
    return literal


def floors(case: GatedCase, direction: str) -> Floors:
    """Multiply-adds of the experts over those of the frozen linear; every expert is needed.

    Backward adds the gradient of the hidden and of x, and of trained experts two products more.
    """
    columns = case.experts * case.rank
    one = columns * (case.in_features + case.out_features)
    passes = {FORWARD: 1, DX: 2, TRAIN: 3 if case.trained else 2}[direction]
    base = case.in_features * case.out_features * (1 if direction == FORWARD else 2)
    return Floors(dense=passes * one / base, sparse=passes * one / base)


def _peft(case: GatedCase, layer: GatedLinear) -> PeftXLoRALinear | None:
    return PeftXLoRALinear.sharing(layer) if has_peft() else None


GATED = Method(
    name="gated",
    title="gated: experts with given weights on a frozen linear (PEMT, OrchMoE's sum, LoRA)",
    case_type=GatedCase,
    cases=_cases(),
    gpu_cases=_gpu_cases(),
    make_inputs=make_inputs,
    reference=reference_layer,
    floors=floors,
    memory_target=lambda case: 8 * case.tokens * (case.experts * case.rank + case.experts),
    plain="stacked",
    variants=(
        Variant("stacked", lambda case, layer: StackedGatedLinear.sharing(layer)),
        Variant(
            "stacked-compiled", lambda case, layer: StackedGatedLinear.sharing(layer), compiled=True
        ),
        Variant("expert-loop", lambda case, layer: ExpertLoopGatedLinear.sharing(layer)),
        Variant("peft-xlora", _peft),
        *OURS,
    ),
)
