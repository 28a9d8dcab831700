"""Every test starts from the same random state, so that a failure can be repeated."""

import fcntl
import hashlib
import subprocess

import devices
import pytest
import torch

import moelora_ops
from moelora_ops.backends import extension


def pytest_addoption(parser):
    parser.addoption(
        "--gpu",
        action="store_true",
        help="GPU kernels run on this machine's CUDA device, not on the emulator",
    )


def pytest_configure(config):
    devices.real = config.getoption("--gpu")


def pytest_runtest_setup(item):
    if not devices.real and item.get_closest_marker("gpu"):
        pytest.skip("needs a CUDA device and --gpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", *([] if extension.why_missing() else ["cpu"])])
def backend(request):
    """The default back end of the test: it runs on each that computes on CPU tensors by itself."""
    moelora_ops.set_default_backend(request.param)
    yield request.param
    moelora_ops.set_default_backend(None)


@pytest.fixture(scope="session")
def cuda_library(request):
    """The CUDA back end for the emulator, built once for the sources as they are."""
    from tools.gpu_emulator import cuda_runtime

    compiler = subprocess.run(["nvcc", "--version"], check=True, capture_output=True).stdout
    contents = b"".join(path.read_bytes() for path in cuda_runtime.sources())
    key = hashlib.sha256(compiler + torch.__version__.encode() + contents).hexdigest()[:16]
    folder = request.config.cache.mkdir("cuda_emulated")
    place, building = folder / key, folder / f"{key}.building"
    with open(folder / "lock", "w") as lock:  # one of several pytest processes builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            building.mkdir(exist_ok=True)
            cuda_runtime.build(building)
            building.rename(place)
    return cuda_runtime.Library(place)
