"""Tiles that were measured to be faster than the rules.

``benchmarks/tune_tiles.py`` writes this.  Nothing has been measured yet.
"""

# ``tiles.key`` -> values instead of the rule's.
TABLE: dict[tuple[str, str, int, int, int, int], dict[str, int]] = {}
