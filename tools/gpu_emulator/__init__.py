"""Runs GPU kernels on the CPU, from their PTX: results, faults and counts, but no times.

Triton launches, made by the code under test itself:

    with emulated_gpu("cuda", 90, execute=True) as gpu:
        y = my_operator(x)                 # CPU tensors; its Triton kernels run here
    for launch in gpu.launches:
        launch.name, launch.grid
        launch.counts                      # Counts: traffic by argument, tensor_flops, instructions
        launch.build.resources             # registers, stack: what the card would use
        launch.build.assembly()            # the PTX, or AMD's assembly

    with emulated_gpu("cuda", 100) as gpu:     # compiles only: 80, 90, 100, or ("hip", "gfx942")
        my_operator(x)

Any PTX, such as nvcc's:

    kernel = load(ptx_text)["name"]
    counts = run(kernel, grid=(4, 2), block=(128,), arguments=[x, y, 3, 1e-5], shared=4096)

`Fault` is raised for what a kernel does wrong, `Unsupported` for an instruction that is not known
here.  What is checked and what cannot be: docs/gpu_emulator.md.
"""

from .counting import Counts, Flow, Traffic
from .errors import Fault, Unsupported
from .instructions.tma import tensor_map
from .machine import run
from .ptx import load

__all__ = [
    "Counts",
    "Fault",
    "Flow",
    "Traffic",
    "Unsupported",
    "emulated_gpu",
    "load",
    "run",
    "tensor_map",
]


def __getattr__(name):
    # Triton is needed for this alone.
    if name == "emulated_gpu":
        from .triton_driver import emulated_gpu

        return emulated_gpu
    raise AttributeError(f"module {__name__} has no attribute {name}")
