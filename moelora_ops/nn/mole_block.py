"""MoLE's equations 5-13 to the letter: whole blocks as experts; plain PyTorch."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import balance, reference
from ..reference import Gating
from .checks import check_choice, check_count
from .loras import stack_loras
from .mole_gate import NORMALIZATIONS

EXPERTS = ("delta", "merged")


class MoLEBlock(nn.Module):
    """``O(x) = F(x) + Σ_i g_i E_i(x)``, F the frozen block and E_i the block run with LoRA i.

    For those who want the paper's block-wise form (2404.13628, eqs. 5-13) as it stands.  Softmax
    attention and activations lie between the LoRAs and an expert's output, so the block runs E + 1
    times and every output is materialised: nothing here is fused, and none of it can be.  With one
    expert this is *not* the model with that LoRA, as x and F(x) are added to it once more.  For
    that see :class:`moelora_ops.nn.MoLELinear`, and for one gate per block
    :class:`moelora_ops.nn.SharedGate`.

    Args:
        block: a module from hidden states ``[batch, length, features]`` to the same, or to a tuple
            that starts with them; its linears are replaced by ones that can switch experts, in
            place, and it is frozen.
        adapters: of each expert a mapping from names of linears inside `block` to (A, B, scale).
        features: width of the hidden states.
        length: most tokens of a sequence, since e has rows for each position (eq. 10).  Shorter
            sequences use its first rows (our choice).
        normalization: of eq. 9, over the whole sequence: ``"l2"``, ``"l2_per_expert"``,
            ``"layernorm"`` without affine parameters, or ``"none"`` (the paper leaves it open).
        experts: ``"delta"``: an expert's linears have the weight ``s_i B_i A_i`` instead of their
            own and no bias (eqs. 7-8; where it has no LoRA but others do: zero); ``"merged"``: in
            addition to their own (our variant).  Linears without any LoRA keep their weight (our
            choice).
        device, dtype: of the experts; by default those of the block.  The gate is float32 at least.

    Parameters:
        gate: e, ``[E, length, features, E]``; zero.
        log_tau: ``[1]``; zero.

    Attributes:
        sequence_mask: bool ``[batch, length]``, False for padding, which the gate does not see; see
            :func:`moelora_ops.sequence_mask`.

    The gate sees the whole sequence, also what comes later, and cannot be used with a cache of keys
    and values.  Its weights count in :func:`moelora_ops.gating_balance_loss`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        block: nn.Module,
        adapters: Sequence[Mapping[str, tuple[Tensor, Tensor, float]]],
        features: int,
        length: int,
        normalization: str = "l2",
        experts: str = "delta",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_count("features", features)
        check_count("length", length)
        check_choice("normalization", normalization, NORMALIZATIONS)
        check_choice("experts", experts, EXPERTS)
        if not adapters or not any(adapters):
            raise ValueError("adapters: wanted at least one with a LoRA")
        like = next(block.parameters())
        new = {"device": device or like.device, "dtype": dtype or like.dtype}
        switched = {
            name: _SwitchedLinear(block, name, adapters, experts == "merged", new)
            for name in dict.fromkeys(name for adapter in adapters for name in adapter)
        }
        for name, linear in switched.items():
            block.set_submodule(name, linear)
        self.block = block.requires_grad_(False)
        self.num_experts, self.features, self.length = len(adapters), features, length
        self.normalization, self.experts = normalization, experts
        self._switched = tuple(switched.values())  # registered in the block
        shape = (self.num_experts, length, features, self.num_experts)
        wide = new | {"dtype": torch.promote_types(new["dtype"], torch.float32)}
        self.gate = nn.Parameter(torch.zeros(shape, **wide))
        self.log_tau = nn.Parameter(torch.zeros(1, **wide))
        self.sequence_mask: Tensor | None = None
        self.routing: Gating | None = None
        self.dprob_sums: Tensor | None = None  # see balance.record

    def forward(self, hidden: Tensor, *args, **kwargs):
        """As the block's, with the weighted experts added to the hidden states."""
        for name in ("past_key_values", "past_key_value", "layer_past"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: a gate over the whole sequence has no cache, got one")
        if hidden.dim() != 3 or hidden.shape[1] > self.length or hidden.shape[2] != self.features:
            raise ValueError(
                f"hidden: wanted shape [batch, length, {self.features}] with a length of at most "
                f"{self.length}, got {list(hidden.shape)}"
            )
        result = self._run(None, hidden, *args, **kwargs)
        outputs = [_first(self._run(i, hidden, *args, **kwargs)) for i in range(self.num_experts)]
        gates = self._gates(torch.stack(outputs, 1))
        y = _first(result)
        mixture = sum(g[:, None, None] * o for g, o in zip(gates.unbind(-1), outputs, strict=True))
        y = y + mixture.to(y.dtype)
        everyone = torch.ones(self.num_experts, dtype=torch.bool, device=gates.device)
        y, self.routing = balance.record(self, y, reference.gating(gates, everyone, None))
        return (y, *result[1:]) if isinstance(result, tuple) else y

    def _run(self, expert: int | None, hidden: Tensor, *args, **kwargs):
        try:
            for linear in self._switched:
                linear.expert = expert
            return self.block(hidden, *args, **kwargs)
        finally:
            for linear in self._switched:
                linear.expert = None

    def _gates(self, outputs: Tensor) -> Tensor:
        """Eqs. 9-11: outputs ``[batch, E, length, features]`` to ``[batch, E]``."""
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        length = outputs.shape[2]
        if self.sequence_mask is not None:
            outputs = outputs.masked_fill(~self.sequence_mask[:, None, :, None], 0)
        # Every position is one more feature of an expert's output.
        return reference.mole_gates(
            outputs.flatten(2), self.gate[:, :length].flatten(1, 2),
            self.log_tau.to(outputs.dtype).exp(), self.normalization,
        )  # fmt: skip

    def __getstate__(self):
        # The last call's by-products belong to its autograd graph: not to be copied or pickled.
        return {**self.__dict__, "routing": None, "dprob_sums": None}

    def extra_repr(self) -> str:
        return (
            f"features={self.features}, length={self.length}, num_experts={self.num_experts}, "
            f"normalization={self.normalization}, experts={self.experts}"
        )


class _SwitchedLinear(nn.Module):
    """A linear that is itself, or one of its experts."""

    def __init__(self, block: nn.Module, name: str, adapters, merged: bool, new: dict):
        super().__init__()
        try:
            base = block.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"adapters: wanted names of linears in the block, got {name}"
            ) from None
        sizes = [getattr(base, size, None) for size in ("in_features", "out_features")]
        if not all(isinstance(size, int) for size in sizes):
            raise TypeError(f"adapters: wanted linears, but {name} is {type(base).__name__}")
        nothing = torch.zeros(1, sizes[0]), torch.zeros(sizes[1], 1), 1.0
        try:
            stack = stack_loras([adapter.get(name, nothing) for adapter in adapters], *sizes, **new)
        except (TypeError, ValueError) as error:
            raise type(error)(f"adapters: {name}: {error}") from error
        self.base, self.merged, self.scales = base, merged, stack.scales
        self.in_features, self.out_features = sizes
        self.register_buffer("lora_down", stack.lora_down)
        self.register_buffer("lora_up", stack.lora_up)
        self.expert: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.expert is None:
            return self.base(x)
        i = self.expert
        y = self.scales[i] * ((x @ self.lora_down[i].t()) @ self.lora_up[i])
        return self.base(x) + y if self.merged else y


def _first(result):
    return result[0] if isinstance(result, tuple) else result
