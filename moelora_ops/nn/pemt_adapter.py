"""PEMT's serial adapter, and what PEMT's layers share."""

import torch
from torch import Tensor, nn

from .. import functional, reference
from .checks import check_count


class PEMTAdapter(nn.Module):
    """``f = z + U gelu_tanh(D z + b_D) + b_U``: the target task's adapter, serial, fused.

    Args:
        features: of z and f.
        bottleneck: rows of D; the authors take 768 / 16 = 48.
        device, dtype: of the parameters.

    Parameters:
        down, up: D and Uᵀ, ``[1, bottleneck, features]``, N(0, 0.01²).
        down_bias, up_bias: ``[1, bottleneck]`` and ``[1, features]``, zero.

    Raises:
        ValueError: a size is no int of at least 1.
    """

    def __init__(self, features: int, bottleneck: int, *, device=None, dtype=None):
        super().__init__()
        check_count("features", features)
        check_count("bottleneck", bottleneck)
        like = {"device": device, "dtype": dtype}
        self.features, self.bottleneck = features, bottleneck
        self.down = nn.Parameter(torch.empty(1, bottleneck, features, **like))
        self.up = nn.Parameter(torch.empty(1, bottleneck, features, **like))
        self.down_bias = nn.Parameter(torch.empty(1, bottleneck, **like))
        self.up_bias = nn.Parameter(torch.empty(1, features, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise anew: nearly the identity (the authors' code)."""
        for weight in (self.down, self.up):
            nn.init.normal_(weight, std=0.01)
        for bias in (self.down_bias, self.up_bias):
            nn.init.zeros_(bias)

    def forward(self, z: Tensor) -> Tensor:
        """z ``[..., features]`` to f of the same shape."""
        # A view, as torch.compile takes no tensor twice.
        return functional.gated(
            z, None, None, self.down, self.up, one_per_token(z), activation="gelu_tanh",
            down_bias=self.down_bias, up_bias=self.up_bias, base_output=z.view_as(z),
        )  # fmt: skip

    @classmethod
    def from_reference(cls, adapter: reference.PEMTAdapter) -> "PEMTAdapter":
        """The fused adapter that shares `adapter`'s parameters."""
        fused = cls(adapter.features, adapter.bottleneck, device="meta")
        share_parameters(fused, adapter, ("down", "up", "down_bias", "up_bias"))
        return fused.train(adapter.training)

    def extra_repr(self) -> str:
        return f"features={self.features}, bottleneck={self.bottleneck}"


def required_ffn_input(ffn_input: Tensor | None) -> Tensor:
    if ffn_input is None:
        raise ValueError(
            "ffn_input: wanted the feed-forward's input, as adapter experts have a residual from "
            "it, got None"
        )
    return ffn_input


def one_per_token(x: Tensor) -> Tensor:
    """The weights of a single expert that is always on."""
    return torch.ones(*x.shape[:-1], 1, device=x.device)


def share_parameters(fused: nn.Module, layer: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        setattr(fused, name, getattr(layer, name))
