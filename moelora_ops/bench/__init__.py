"""The microbenchmarks that ``python -m moelora_ops.bench`` runs: one registry entry per method."""

from .mola import MOLA

METHODS = {method.name: method for method in (MOLA,)}
