"""The microbenchmarks that ``python -m moelora_ops.bench`` runs: one registry entry per method."""

from .gated import GATED
from .mola import MOLA
from .mole import MOLE
from .mor1e import MOR1E
from .orchmoe import ORCHMOE
from .pemt import PEMT

METHODS = {method.name: method for method in (MOLA, MOLE, MOR1E, ORCHMOE, GATED, PEMT)}
