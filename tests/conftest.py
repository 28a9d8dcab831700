"""Every test starts from the same random state, so that a failure can be repeated."""

import devices
import pytest
import torch

import moelora_ops
from moelora_ops.backends import extension

# Started first, so that no process of many is left alone with one of them at the end.
LONGEST_FILES = (
    "test_gpu_mixes.py", "test_triton_compile.py", "test_gpu_grouped.py", "test_triton.py",
    "test_cuda_source.py", "test_cuda.py", "test_kernels.py", "test_gpu_traffic.py",
    "test_gpu_emulator_triton.py", "test_cuda_traffic.py",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        "--gpu",
        action="store_true",
        help="GPU kernels run on this machine's CUDA device, not on the emulator",
    )


def pytest_configure(config):
    devices.real = config.getoption("--gpu")


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


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


@pytest.fixture(params=("cuda", "triton"))
def gpu_backend(request):
    return request.param


@pytest.fixture
def gpu(gpu_backend, request):
    """Makes a GPU that the back end runs on, see ``gpus.make_gpu``."""
    import gpus

    return gpus.make_gpu(gpu_backend, request)


@pytest.fixture(scope="session")
def cuda_library(request):
    """The CUDA back end for the emulator, built once for the sources as they are."""
    from tools.gpu_emulator import cuda_runtime

    return cuda_runtime.cached(request.config.cache.mkdir("cuda_emulated"))
