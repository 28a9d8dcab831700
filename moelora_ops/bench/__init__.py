"""The microbenchmarks that ``python -m moelora_ops.bench`` runs: one registry entry per method."""

from .mola import MOLA
from .mor1e import MOR1E

METHODS = {method.name: method for method in (MOLA, MOR1E)}
