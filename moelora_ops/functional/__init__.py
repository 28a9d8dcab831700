"""The methods as stateless functions: validate, apply autocast, run the chosen back end."""

from ..autograd import plain_backward
from ..reference import Routing
from .averaged import averaged
from .common import autocast_dtype, check_dropout, check_finite, check_top_k, is_number
from .cosines import expert_cosines, expert_rotations
from .gated import gated
from .mola import mola
from .mole import mole
from .mor1e import mor1e
from .products import expand, expand_, linear_expand, shrink

__all__ = [
    "Routing",
    "autocast_dtype",
    "averaged",
    "check_dropout",
    "check_finite",
    "check_top_k",
    "expand",
    "expand_",
    "expert_cosines",
    "expert_rotations",
    "gated",
    "is_number",
    "linear_expand",
    "mola",
    "mole",
    "mor1e",
    "plain_backward",
    "shrink",
]
