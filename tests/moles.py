"""What the tests of MoLE share: small layers whose numbers depend on the options alone."""

import torch
from torch import nn

from moelora_ops.nn import MoLELinear

NORMALIZATIONS = ("l2", "l2_per_expert", "layernorm", "none")
PADDING = torch.tensor([[True, True, True, False], [True, True, False, False]])


def make_loras(ranks=(2, 3, 1), in_features=7, out_features=5, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=random, dtype=torch.float64).to(dtype)

    return [
        (normal(r, in_features), normal(out_features, r), 0.5 * i + 0.5)
        for i, r in enumerate(ranks)
    ]


def make_layer(cls=MoLELinear, dtype=torch.float64, mask=None, **options):
    """A layer with a random gate; the same one for the same options."""
    torch.manual_seed(0)
    layer = cls(nn.Linear(7, 5).to(dtype), make_loras(dtype=dtype), **options)
    if layer.gated:
        nn.init.normal_(layer.gate)
        nn.init.constant_(layer.log_tau, -0.3)
        if mask is not None:
            layer.expert_mask = torch.tensor(mask)
    return layer


def make_input(*lead, seed=1, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, 7, generator=random, dtype=torch.float64).to(dtype)


def assert_all_close(got, want, **tolerance):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, **tolerance)
