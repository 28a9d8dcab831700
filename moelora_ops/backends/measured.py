"""Back ends that were measured to be the fastest.

``benchmarks/choose_backends.py`` writes this.  Nothing has been measured yet.
"""

# (mix, architecture) -> back end.
TABLE: dict[tuple[str, str], str] = {}
