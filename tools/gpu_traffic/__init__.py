"""What the GPU kernels move, counted without a GPU: ``python -m tools.gpu_traffic``.

`cases` names the calls, one row per method; `recording` runs one through the public functions on an
emulated GPU and keeps every launch; `accounts` says by formula what each kernel moves, one row per
kernel.  ``tests/test_gpu_traffic.py`` holds the formulas against what was executed on small shapes,
and the figures for a large one against their budgets.  `report` writes docs/gpu_traffic.md.
"""
