"""What every layer shares: a frozen base with in and out features, and how its output joins."""

import math

import torch
from torch import Tensor, nn

from .. import balance
from ..functional import Routing
from ..reference import LooksLikeBase

_PARALLEL = (
    "if it is tensor parallel, let it take and return all features: "
    "ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())"
)


class AdapterLinear(LooksLikeBase, nn.Module):
    """A frozen linear layer with trainable experts beside it.

    The base may be an ``nn.Linear``, whose product the functions compute themselves, or any module
    with ``in_features`` and ``out_features`` (quantised, sharded, foreign): then it is called as it
    is and the experts are added to its output.  ``layer.weight`` and ``layer.bias`` are the base's,
    for models that look at them.

    Args:
        base: the layer to adapt; its parameters are frozen (``requires_grad_(False)``).
        device, dtype: of the new parameters; by default those of ``base.weight``.

    Raises:
        TypeError: `base` is no module, or lacks ``in_features`` or ``out_features``.
    """

    def __init__(self, base: nn.Module, device=None, dtype=None):
        super().__init__()
        if not isinstance(base, nn.Module):
            raise TypeError(f"base: wanted a torch.nn.Module, got {type(base).__name__}")
        for name in ("in_features", "out_features"):
            if not isinstance(getattr(base, name, None), int):
                raise TypeError(
                    f"base: wanted a layer with an integer {name}, got {type(base).__name__}"
                )
        if isinstance(base, AdapterLinear):
            raise TypeError(f"base: is already adapted ({type(base).__name__})")
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base = base.requires_grad_(False)
        like = next((t for t in (*base.parameters(), *base.buffers())), torch.empty(0))
        if dtype is None:
            floating = like.is_floating_point() and like.element_size() > 1
            dtype = like.dtype if floating else torch.get_default_dtype()
        self._new = {"device": like.device if device is None else device, "dtype": dtype}
        self.routing: Routing | None = None
        self.dprob_sums: Tensor | None = None  # see balance.record

    def _new_parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(*shape, **self._new))

    def base_arguments(self, x: Tensor) -> dict[str, Tensor | None]:
        """The base as arguments of a method's function: weight and bias, or its output for x."""
        base = self.base
        if self.base_is_linear():
            return {"weight": base.weight, "bias": base.bias, "base_output": None}
        return {"weight": None, "bias": None, "base_output": self.base_output(x)}

    def base_is_linear(self) -> bool:
        """Whether the functions may compute the base's product themselves."""
        base = self.base
        # Exactly nn.Linear: quantised layers subclass it; hooks and parametrisations need the call.
        return type(base) is nn.Linear and not (
            "forward" in base.__dict__  # replaced, as accelerate does
            or base._forward_hooks
            or base._forward_pre_hooks
            or base._backward_hooks
            or base._backward_pre_hooks
        )

    def base_output(self, x: Tensor) -> Tensor:
        """What the base, called as a module, says to x.

        Raises:
            ValueError: x or the output has some of the features only (tensor parallel), where the
                experts need and make all.
        """
        if isinstance(x, Tensor) and x.dim() and x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: wanted last dimension {self.in_features}, got {x.shape[-1]}; {_PARALLEL}"
            )
        y = self.base(x)
        if y.shape[-1] != self.out_features:
            raise ValueError(
                f"base: wanted an output of {self.out_features} features, got {y.shape[-1]}; "
                + _PARALLEL
            )
        return y

    def _record(self, y: Tensor, routing: Routing) -> Tensor:
        """Keep this call's routing for ``aux_loss`` and ``routing_stats``; returns y."""
        y, self.routing = balance.record(self, y, routing)
        return y

    def __getstate__(self):
        # The last call's by-products belong to its autograd graph: not to be copied or pickled.
        return {**self.__dict__, "routing": None, "dprob_sums": None}


def init_stack(stack: nn.Parameter, fan_in: int) -> None:
    """Kaiming-uniform(a=√5) of every expert in ``[E, r, features]``, that is ±1/√fan_in.

    All at once: of a sharded parameter, one expert's rows would be a copy.
    """
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(stack, -bound, bound)
