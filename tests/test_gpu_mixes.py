"""Dense mixes of the GPU back ends, through their public functions, run on CPU tensors.

As in test_triton.py, cases share shapes, so that Triton's kernels are compiled once.
"""

import contextlib

import pytest
import torch
from gpus import names, opcheck
from mixes import MIXES, SIZES, Size, assert_within_budget, make_inputs, recorded_calls, run

from moelora_ops import ops
from moelora_ops.backends import extension
from moelora_ops.bench import numerics

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
AGREE_WITH = None if extension.why_missing() else "cpu"

NO_TOKENS, DECODE, SMALL, STANDARD, EXPERTS, MANY = (SIZES[i] for i in (0, 1, 4, 7, 10, 11))
HIGHEST_RANK = Size((20,), 40, 56, 2, 130)
LONG = Size((2, 520), 24, 40, 3, 2)
LONG_GRID = Size((2, 140), 24, 40, 3, 2)
MANY_GATES = Size((3,), 40, 24, 128, 3)
SOME_GATES = Size((3,), 40, 24, 48, 3)  # 144, and as many rows as take two tiles
RANK_ONE = Size((21,), 40, 24, 5, 1)

# What a mix is given per token, per sequence or by a row_map.
TABLE = {"gated": "weights", "averaged": "weights", "grid": "intuition"}
# The gradients of omega, beta and tau are a number each: one draw says little about its error.
DRAWS = {"grid": 4, "output_gate": 2}


def on_backends(**cases):
    """(backend, *case) of each."""
    return [(backend, *case) for backend, own in cases.items() for case in own]


# With one multiprocessor blocks are as large as for many tokens.
@pytest.mark.parametrize(
    ("gpu_backend", "name", "variant", "size", "arch", "dtype", "multiprocessors"),
    on_backends(
        cuda=[
            ("gated", "sequence", NO_TOKENS, 90, BF16, None),
            ("gated", "scales", DECODE, 90, BF16, None),
            ("gated", "map-relu", STANDARD, 90, BF16, None),
            ("gated", "map-relu", STANDARD, 80, F16, 1),
            ("gated", "gelu_tanh-biases", STANDARD, 90, BF16, 1),
            ("gated", "gelu-biases", HIGHEST_RANK, 80, F16, None),
            ("gated", "dropout", MANY, 80, F32, None),
            ("gated", "map-relu", SMALL, 80, F64, None),
            ("gated", "gelu_tanh-biases", SMALL, 80, F64, 1),
            ("grid", "token", NO_TOKENS, 90, BF16, None),
            ("grid", "token", DECODE, 90, BF16, None),
            ("grid", "map", STANDARD, 90, BF16, 1),
            ("grid", "bare", RANK_ONE, 80, F16, None),
            ("grid", "rank1-sequence", STANDARD, 90, BF16, None),
            ("grid", "sequence", LONG_GRID, 80, F32, None),
            ("grid", "token", SOME_GATES, 80, F16, None),
            ("grid", "map", SMALL, 80, F64, None),
            ("grid", "rank1", SMALL, 80, F64, 1),
            ("averaged", "token", NO_TOKENS, 90, BF16, None),
            ("averaged", "sequence", NO_TOKENS, 90, BF16, None),
            ("averaged", "token", DECODE, 90, BF16, None),
            ("averaged", "map", STANDARD, 90, BF16, 1),
            ("averaged", "splits", STANDARD, 80, F16, None),
            ("averaged", "splits-sequence", STANDARD, 90, BF16, None),
            ("averaged", "sequence", LONG, 80, F32, None),
            ("averaged", "sequence", HIGHEST_RANK._replace(lead=(2, 10)), 80, F16, None),
            ("averaged", "splits", SMALL, 80, F64, None),
            ("averaged", "splits-sequence", SMALL, 80, F64, 1),
            ("output_gate", "l2", NO_TOKENS, 90, BF16, None),
            ("output_gate", "l2", DECODE, 90, BF16, None),
            ("output_gate", "l2_per_expert", STANDARD, 90, BF16, None),
            ("output_gate", "layernorm", STANDARD, 80, F16, 1),
            ("output_gate", "masked-input", STANDARD, 90, BF16, 1),
            ("output_gate", "sequence-layernorm", STANDARD, 90, BF16, None),
            ("output_gate", "masked-input-layernorm", LONG, 80, F32, None),
            ("output_gate", "none", MANY_GATES, 80, F16, None),
            ("output_gate", "l2_per_expert", HIGHEST_RANK, 80, F16, None),
            ("output_gate", "masked-input-layernorm", SMALL, 80, F64, None),
            ("output_gate", "masked", SMALL, 80, F64, 1),
        ],
        triton=[
            ("gated", "token", NO_TOKENS, 90, BF16, None),
            ("gated", "sequence", NO_TOKENS, 90, BF16, None),
            ("gated", "scales", DECODE, 90, BF16, None),
            ("gated", "map-relu", STANDARD, 90, BF16, None),
            ("gated", "map-relu", STANDARD, 90, BF16, 1),
            ("gated", "gelu_tanh-biases", STANDARD, 90, BF16, None),
            ("gated", "gelu-biases", HIGHEST_RANK, 80, F16, None),
            ("gated", "dropout", MANY, 80, F32, None),
            ("averaged", "token", NO_TOKENS, 90, BF16, None),
            ("averaged", "sequence", NO_TOKENS, 90, BF16, None),
            ("averaged", "map", STANDARD, 90, BF16, None),
            ("averaged", "splits", STANDARD, 80, F16, None),
            ("averaged", "splits-sequence", STANDARD, 90, BF16, None),
            ("averaged", "sequence", LONG, 80, F32, None),
            ("grid", "sequence", NO_TOKENS, 90, BF16, None),
            ("grid", "token", STANDARD, 90, BF16, None),
            ("grid", "sequence", STANDARD, 90, BF16, None),
            ("grid", "map", STANDARD, 90, BF16, None),
            ("grid", "map", STANDARD, 90, BF16, 1),
            ("grid", "bare", STANDARD, 90, BF16, None),
            ("grid", "rank1", STANDARD, 90, BF16, None),
            ("grid", "rank1-sequence", LONG, 80, F32, None),
            ("grid", "token", EXPERTS, 80, F16, None),
            ("output_gate", "l2", NO_TOKENS, 90, BF16, None),
            ("output_gate", "l2", STANDARD, 90, BF16, None),
            ("output_gate", "l2_per_expert", STANDARD, 90, BF16, None),
            ("output_gate", "layernorm", STANDARD, 90, BF16, None),
            ("output_gate", "none", STANDARD, 90, BF16, None),
            ("output_gate", "masked", STANDARD, 90, BF16, None),
            ("output_gate", "masked-input", STANDARD, 90, BF16, 1),
            ("output_gate", "sequence", STANDARD, 90, BF16, None),
            ("output_gate", "sequence-layernorm", STANDARD, 90, BF16, None),
            ("output_gate", "sequence-per-expert", STANDARD, 90, BF16, None),
            ("output_gate", "masked-input-layernorm", LONG, 80, F32, None),
            ("output_gate", "l2", EXPERTS, 80, F16, None),
            ("output_gate", "l2_per_expert", HIGHEST_RANK, 80, F16, None),
        ],
    ),
    ids=str,
)
def test_matches_reference(gpu, name, variant, size, arch, dtype, multiprocessors):
    """Output and every gradient, as close to the reference and the C++ kernels as PyTorch is."""
    launched = []

    @contextlib.contextmanager
    def on():
        with gpu(arch, multiprocessors) as device:
            yield
        launched.append(names(device))

    assert_within_budget(on, name, variant, size, dtype, DRAWS.get(name, 1), AGREE_WITH)
    # Beside the base GEMM: at most 3 forward and 5 backward.
    assert len(launched[0]) <= (8 if torch.Size(size.lead).numel() else 0)


FEW = ["shrink_parts", "mix_and_expand", "shrink_parts", "mix_backward", "expand_rows"]
FUSED = ["shrink_and_mix", "expand_rows", "shrink_and_mix_backward", "expand_rows"]
MERGED = ["merge", "shrink_sequences", "expand_sequences"]
FEW_MERGED = ["merge_and_shrink", "merge_and_expand"]
CUDA_FEW = ["shrink", "mix_and_expand"]
CUDA_SPLIT = ["shrink", "mix", "expand"]
CUDA_BACKWARD = [*CUDA_SPLIT, "outer"]
CUDA_FUSED = ["shrink", "expand", "shrink", "expand", "outer"]
CUDA_MERGED = ["merge", "shrink", "expand"]
CUDA_FEW_MERGED = ["shrink", "merge_and_expand"]


@pytest.mark.parametrize(
    ("gpu_backend", "name", "variant", "multiprocessors", "want"),
    on_backends(
        cuda=[
            ("gated", "map-relu", 132, [*CUDA_FEW, *CUDA_BACKWARD]),
            ("gated", "map-relu", 1, CUDA_FUSED),
            ("gated", "dropout", 132, [*CUDA_FEW, *CUDA_BACKWARD]),
            ("grid", "map", 132, [*CUDA_FEW, *CUDA_BACKWARD]),
            ("grid", "map", 1, CUDA_FUSED),
            ("averaged", "splits", 1, [*CUDA_FEW, *CUDA_BACKWARD]),
            ("averaged", "map", 132, [*CUDA_FEW, *CUDA_BACKWARD]),
            ("averaged", "map", 1, CUDA_FUSED),
            (
                "averaged", "splits-sequence", 132,
                [*CUDA_FEW_MERGED, *CUDA_MERGED, "outer", "unmerge"],
            ),
            ("output_gate", "l2", 132, [*CUDA_FEW, *CUDA_BACKWARD]),
            ("output_gate", "l2", 1, CUDA_FUSED),
        ],
        triton=[
            ("gated", "map-relu", 132, [*FEW, "outer_parts"]),
            ("gated", "map-relu", 1, [*FUSED, "outer_parts"]),
            ("averaged", "map", 132, [*FEW, "outer_parts"]),
            (
                "averaged", "splits-sequence", 132,
                [*FEW_MERGED, *MERGED, "outer_sequences", "unmerge"],
            ),
            ("grid", "map", 132, [*FEW, "outer_parts"]),
            ("output_gate", "l2", 132, [*FEW, "outer_parts"]),
        ],
    ),
)  # fmt: skip
def test_launches(gpu, name, variant, multiprocessors, want):
    inputs = make_inputs(name, variant, STANDARD._replace(lead=(3, 4)), BF16)
    with gpu(90, multiprocessors) as device:
        run(MIXES[name].function, inputs)
    assert names(device) == want


@pytest.mark.parametrize(
    ("gpu_backend", "name", "variant", "size", "want"),
    on_backends(
        cuda=[
            ("gated", "token", Size((24,), 16, 24, 128, 22), ["wgmma_shrink", "mix", "expand"]),
            ("averaged", "sequence", Size((1, 3), 48, 24, 128, 12), CUDA_MERGED),
        ],
        triton=[
            ("gated", "token", EXPERTS._replace(K=200), ["shrink_parts", "mix", "expand_rows"]),
            ("averaged", "sequence", HIGHEST_RANK._replace(lead=(1, 20)), MERGED),
        ],
    ),
)
def test_few_tokens_that_a_block_cannot_hold(gpu, name, variant, size, want):
    inputs = make_inputs(name, variant, size, BF16)
    with gpu(90) as device:
        MIXES[name].function(**inputs.tensors, **inputs.options)
        assert names(device) == want
        if name == "gated":
            whole, _ = adapter(name, inputs, list(range(size.lead[0])))
            device.launches.clear()
            alone, _ = adapter(name, inputs, [5])
            assert names(device)[1] == "mix_and_expand"
            assert torch.equal(alone, whole[[5]])


def adapter(name, inputs, rows):
    """Output and dx of the adapter alone for some rows of x's first dimension."""
    tensors = {n: t for n, t in inputs.tensors.items() if n not in ("weight", "bias")}
    options = dict(inputs.options)
    x = tensors["x"] = tensors["x"][rows].requires_grad_()
    if "row_map" in options:
        options["row_map"] = options["row_map"][rows]
    elif name in TABLE:
        tensors[TABLE[name]] = tensors[TABLE[name]][rows]
    dy = inputs.dy[rows]
    base_output = torch.zeros_like(dy)
    y = MIXES[name].function(**tensors, weight=None, bias=None, base_output=base_output, **options)
    return y.detach(), *torch.autograd.grad(y, x, dy)


@pytest.mark.parametrize(
    ("name", "variant"),
    [("gated", "map-relu"), ("averaged", "map"), ("grid", "map"), ("output_gate", "l2")],
)
def test_a_token_does_not_depend_on_its_neighbours(gpu, gpu_backend, name, variant):
    """The same bits alone and among others, whatever the tiles and wherever the mix runs."""
    inputs = make_inputs(name, variant, STANDARD._replace(lead=(70,)), BF16)
    with gpu(90):
        whole = adapter(name, inputs, list(range(70)))
    for multiprocessors in (132,) if (gpu_backend, name) == ("triton", "averaged") else (132, 1):
        with gpu(90, multiprocessors) as device:
            for rows in ([7], [66, 3, *range(8, 38)], list(range(70))):
                device.launches.clear()
                for got, want in zip(adapter(name, inputs, rows), whole, strict=True):
                    assert torch.equal(got, want[rows])
                if multiprocessors == 132:
                    few = len(rows) <= 32
                    assert names(device)[1] == ("mix_and_expand" if few else "mix")


def test_a_token_does_not_depend_on_its_sequence(gpu, gpu_backend):
    """Merged factors: the same bits in a shorter sequence, and beside fewer."""
    inputs = make_inputs("averaged", "splits-sequence", STANDARD, BF16)
    with gpu(90) as device:
        whole = adapter("averaged", inputs, [0, 1])
        for rows, length in (([1], 1), ([1, 0], 16), ([1, 0], 20)):
            short = inputs._replace(
                tensors=inputs.tensors | {"x": inputs.tensors["x"][:, :length].contiguous()},
                dy=inputs.dy[:, :length].contiguous(),
            )
            device.launches.clear()
            for got, want in zip(adapter("averaged", short, rows), whole, strict=True):
                assert torch.equal(got, want[rows, :length])
            few = len(rows) * length <= 32
            if gpu_backend == "cuda":
                want = CUDA_FEW_MERGED if few else CUDA_MERGED
            else:
                want = FEW_MERGED if few else MERGED
            assert names(device)[:2] == want[:2]


# ---------------------------------------------------------------- shared weights


@pytest.mark.parametrize(
    ("name", "variant"),
    [("gated", "map-relu"), ("averaged", "map"), ("grid", "map"), ("output_gate", "masked-input")],
)
def test_a_token_that_is_not_finite_spoils_no_other(gpu, name, variant):
    """Its row and its row of the weights are NaN; the others keep their bits."""
    inputs = make_inputs(name, variant, STANDARD._replace(lead=(70,)), BF16)
    spoiled_rows = {"y": 3}
    if name != "averaged":  # which is linear in x
        spoiled_rows["dx"] = 3
    if name in TABLE:
        spoiled_rows[f"d{TABLE[name]}"] = int(inputs.options["row_map"][3])
    results = []
    for value in (inputs.tensors["x"][3].clone(), float("nan")):
        inputs.tensors["x"][3] = value
        with gpu(90):
            results.append(run(MIXES[name].function, inputs))
    clean, spoiled = results
    for key, own in spoiled_rows.items():
        others = [i for i in range(len(clean[key])) if i != own]
        assert clean[key].isfinite().all()
        assert torch.equal(spoiled[key][others], clean[key][others])
        assert spoiled[key][own].isnan().all()


WEIGHTS_ALONE = ["shrink_parts", "mix_backward", "outer_parts"]
CUDA_WEIGHTS_ALONE = ["shrink", "mix", "outer", "add_parts"]


@pytest.mark.parametrize(
    ("gpu_backend", "name", "variant", "trained", "want"),
    on_backends(
        cuda=[
            ("gated", "gelu_tanh-biases", "weights", CUDA_WEIGHTS_ALONE),
            ("gated", "token", "weights", ["shrink", "mix"]),
            ("grid", "map", "intuition", CUDA_WEIGHTS_ALONE),
            ("grid", "token", "intuition", ["shrink", "mix"]),
            ("averaged", "map", "weights", CUDA_WEIGHTS_ALONE),
            ("averaged", "token", "weights", ["shrink", "mix"]),
            (
                "averaged", "splits-sequence", "weights",
                ["merge", "shrink", "outer", "unmerge"],
            ),
            ("output_gate", "l2", "gate", CUDA_WEIGHTS_ALONE),
        ],
        triton=[
            ("gated", "gelu_tanh-biases", "weights", WEIGHTS_ALONE),
            ("averaged", "map", "weights", WEIGHTS_ALONE),
            (
                "averaged", "splits-sequence", "weights",
                ["merge", "shrink_sequences", "outer_sequences", "unmerge"],
            ),
            ("grid", "token", "intuition", ["shrink_parts", "mix_backward"]),
            ("grid", "map", "intuition", WEIGHTS_ALONE),
            ("output_gate", "l2", "gate", WEIGHTS_ALONE),
        ],
    ),
)  # fmt: skip
def test_frozen_experts_with_trained_weights(gpu, name, variant, trained, want):
    """Nothing is computed but the weights' gradient."""
    inputs = make_inputs(name, variant, STANDARD, BF16)
    weights = inputs.tensors[trained].clone().requires_grad_()
    with gpu(90) as device:
        everything = run(MIXES[name].function, inputs)
        y = MIXES[name].function(**inputs.tensors | {trained: weights}, **inputs.options)
        device.launches.clear()
        (dweights,) = torch.autograd.grad(y, weights, inputs.dy)
    assert names(device) == want
    torch.testing.assert_close(dweights, everything[f"d{trained}"], rtol=1e-5, atol=1e-5)


def test_a_gradient_that_reaches_the_gates(gpu):
    """As a balance loss sends it, beside that of y and alone."""
    inputs = make_inputs("output_gate", "l2", STANDARD, BF16)
    dgates = torch.randn(*STANDARD.lead, STANDARD.E, generator=torch.Generator().manual_seed(7))

    def with_gates(function, inputs, dy):
        leaves = {n: inputs.tensors[n].clone().requires_grad_() for n in ("x", "gate", "tau")}
        y, gates = function(**inputs.tensors | leaves, **inputs.options, return_gates=True)
        outputs, gradients = (gates,), (dgates.to(gates.dtype),)
        if dy is not None:
            outputs, gradients = (y, gates), (dy, *gradients)
        grads = torch.autograd.grad(outputs, list(leaves.values()), gradients)
        return {"gates": gates.detach()} | {
            f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)
        }

    mix, exact = MIXES["output_gate"], inputs.to(torch.float64)
    for dy in (inputs.dy, None):
        with gpu(90):
            got = with_gates(mix.function, inputs, dy)
        plain = with_gates(mix.reference, inputs, dy)
        want = with_gates(mix.reference, exact, None if dy is None else exact.dy)
        numerics.check_numerics("gates", got, plain, want)


# ---------------------------------------------------------------- operators


_calls = {}


def calls_of(gpu, backend, name, variant, lead=(20,)):
    """The arguments of the operators of a mix in one forward and backward pass."""
    operators = (f"{name}_forward", f"{name}_backward")
    key = (backend, name, variant, lead)
    if key not in _calls:
        inputs = make_inputs(name, variant, STANDARD._replace(lead=lead), BF16)
        with gpu(90), recorded_calls(ops.of(backend), operators) as calls:
            run(MIXES[name].function, inputs)
        _calls[key] = tuple(calls[operator][0] for operator in operators)
    return _calls[key]


@pytest.mark.parametrize(
    ("name", "variant", "lead"),
    [
        ("gated", "map-relu", (20,)),
        ("averaged", "map", (20,)),
        ("averaged", "splits-sequence", (2, 10)),
        ("grid", "map", (20,)),
        ("grid", "rank1", (20,)),
        ("output_gate", "masked-input", (20,)),
        ("output_gate", "layernorm", (20,)),
    ],
)
def test_opcheck(gpu, gpu_backend, name, variant, lead):
    calls = calls_of(gpu, gpu_backend, name, variant, lead)
    with gpu(90) as device:
        for direction, arguments in zip(("forward", "backward"), calls, strict=True):
            opcheck(device, gpu_backend, f"{name}_{direction}", arguments)


# Where the operators' arguments are.
ROW_MAP = {"gated_forward": 6, "averaged_forward": 4, "grid_forward": 7}


@pytest.mark.parametrize(
    ("name", "variant"), [("gated", "map-relu"), ("averaged", "map"), ("grid", "map")]
)
def test_a_row_that_does_not_exist_reads_as_nan(gpu, gpu_backend, name, variant):
    """A wrong row_map reaches no foreign memory; on a GPU its values are not looked at before."""
    arguments, _ = calls_of(gpu, gpu_backend, name, variant)
    outputs = []
    for wrong in (False, True):
        y = torch.zeros(20, STANDARD.N, dtype=BF16)
        call = [y if isinstance(a, torch.Tensor) and a.shape == y.shape else a for a in arguments]
        if wrong:
            rows = call[ROW_MAP[f"{name}_forward"]] = arguments[ROW_MAP[f"{name}_forward"]].clone()
            rows[3], rows[11] = 4, -1
        with gpu(90):
            getattr(ops.of(gpu_backend), f"{name}_forward")(*call)
        outputs.append(y)
    right, wrong = outputs
    others = [t for t in range(20) if t not in (3, 11)]
    assert torch.equal(wrong[others], right[others]) and right.isfinite().all()
    assert wrong[[3, 11]].isnan().all()


# What would make a kernel read or write out of bounds, and the argument that the error names.
@pytest.mark.parametrize(
    ("operator", "variant", "position", "bad", "name"),
    [
        ("gated_forward", "map-relu", 0, torch.zeros(20, 199, dtype=BF16), "x"),
        ("gated_forward", "map-relu", 1, torch.zeros(8, 7, 200, dtype=BF16), "lora_up"),
        ("gated_forward", "map-relu", 2, torch.zeros(7, 8, dtype=BF16), "down_bias"),
        ("gated_forward", "map-relu", 4, torch.zeros(8, 135, dtype=BF16), "up_bias"),
        ("gated_forward", "map-relu", 5, torch.zeros(4, 7), "weights"),
        ("gated_forward", "map-relu", 5, torch.zeros(4, 8, dtype=BF16), "weights"),
        ("gated_forward", "map-relu", 6, torch.zeros(19, dtype=torch.int32), "row_map"),
        ("gated_forward", "map-relu", 6, torch.zeros(20, dtype=torch.int64), "row_map"),
        ("gated_forward", "map-relu", 9, torch.zeros(20, 135, dtype=BF16), "y"),
        ("gated_forward", "map-relu", 11, 4, "activation"),
        ("gated_backward", "map-relu", 0, torch.zeros(19, 136, dtype=BF16), "dy"),
        ("gated_backward", "map-relu", 9, torch.zeros(20, 63), "hidden"),
        ("gated_backward", "map-relu", 10, torch.zeros(20, 199, dtype=BF16), "dx"),
        ("averaged_forward", "map", 3, torch.zeros(4, 9), "weights"),
        ("averaged_forward", "map", 7, 3, "splits"),
        ("averaged_forward", "map", 9, True, "row_map"),
        ("averaged_backward", "map", 6, torch.zeros(20, 8), "hidden"),
        ("averaged_backward", "map", 7, torch.zeros(20, 199, dtype=BF16), "dx"),
        ("grid_forward", "map", 0, torch.zeros(20, 199, dtype=BF16), "x"),
        ("grid_forward", "map", 1, torch.zeros(8, 1, 200, dtype=BF16), "lora_down"),
        ("grid_forward", "map", 2, torch.zeros(0, 136, dtype=BF16), "lora_up"),
        ("grid_forward", "map", 4, torch.zeros(1), "omega"),
        ("grid_forward", "map", 5, torch.zeros(2, dtype=BF16), "beta"),
        ("grid_forward", "map", 6, torch.zeros(4, 63), "intuition"),
        ("grid_forward", "map", 7, torch.zeros(19, dtype=torch.int32), "row_map"),
        ("grid_forward", "map", 9, torch.zeros(20, 135, dtype=BF16), "y"),
        ("grid_forward", "map", 12, True, "router"),
        ("grid_backward", "map", 0, torch.zeros(19, 136, dtype=BF16), "dy"),
        ("grid_backward", "map", 9, torch.zeros(20, 71), "hidden"),
        ("grid_backward", "map", 10, torch.zeros(20, 199, dtype=BF16), "dx"),
        ("output_gate_forward", "layernorm", 1, torch.zeros(8, 7, 200, dtype=BF16), "lora_up"),
        ("output_gate_forward", "layernorm", 3, torch.zeros(64, 8), "projection"),
        ("output_gate_forward", "layernorm", 4, torch.zeros(8, 8, 8, dtype=BF16), "factors"),
        ("output_gate_forward", "layernorm", 5, None, "means"),
        ("output_gate_forward", "layernorm", 6, torch.zeros(7), "scales"),
        ("output_gate_forward", "layernorm", 7, torch.zeros(2), "tau"),
        ("output_gate_forward", "layernorm", 8, torch.zeros(7, dtype=torch.bool), "mask"),
        ("output_gate_forward", "layernorm", 10, torch.zeros(20, 135, dtype=BF16), "y"),
        ("output_gate_forward", "layernorm", 11, 4, "normalization"),
        ("output_gate_backward", "layernorm", 0, torch.zeros(19, 136, dtype=BF16), "dy"),
        ("output_gate_backward", "layernorm", 1, torch.zeros(20, 7), "dgates"),
        ("output_gate_backward", "layernorm", 10, torch.zeros(20, 63), "hidden"),
        ("output_gate_backward", "layernorm", 11, torch.zeros(19, 8), "gates"),
        ("output_gate_backward", "layernorm", 12, torch.zeros(20, 199, dtype=BF16), "dx"),
    ],
)
def test_operators_called_directly_do_not_leave_their_memory(
    gpu, gpu_backend, operator, variant, position, bad, name
):
    mix, direction = operator.rsplit("_", 1)
    arguments = list(calls_of(gpu, gpu_backend, mix, variant)[direction == "backward"])
    arguments[position] = bad
    with gpu(90) as device, pytest.raises(RuntimeError, match=name):
        getattr(ops.of(gpu_backend), operator)(*arguments)
    assert not device.launches
