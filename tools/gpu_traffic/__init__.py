"""What the GPU kernels move, counted without a GPU: ``python -m tools.gpu_traffic``.

`cases` names the calls, one row per method; `recording` runs one through the public functions on an
emulated GPU, with either back end, and keeps every launch; `accounts` says by formula what each
kernel moves, in a table for each back end.  ``tests/test_gpu_traffic.py`` and
``tests/test_cuda_traffic.py`` hold the formulas against what was executed on small shapes, and the
figures for a large one against their budgets.  `report` writes docs/gpu_traffic.md, for which nvcc
builds the CUDA kernels.
"""
