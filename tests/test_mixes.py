"""The dense mixes through their public functions: the float64 reference, bits, contracts."""

import mixes
import pytest
import torch
from isa_levels import ISA_LEVELS, run_at
from mixes import MIXES, SIZES, Size, cases, make_inputs, run

from moelora_ops import functional, ops, use_backend
from moelora_ops.backends import extension

pytestmark = pytest.mark.skipif(bool(extension.why_missing()), reason=extension.why_missing())

CASES = [pytest.param(*c, id="-".join(map(str, c))) for c in cases()]
SMALL = Size((3, 4), 6, 8, 3, 2)
VARIANTS = [pytest.param(n, v, id=f"{n}-{v}") for n, m in MIXES.items() for v in m.variants]


def assert_within_budget(name, variant, size, dtype):
    tokens = torch.Size(size.lead).numel()
    # Pooled, so that few numbers do not decide by luck.
    draws = 2 if tokens >= 64 else 8 if tokens * min(size.K, size.N) >= 16 else 32
    mixes.assert_within_budget(lambda: use_backend("cpu"), name, variant, size, dtype, draws)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("name", "variant", "size"), CASES)
def test_matches_reference(name, variant, size, dtype):
    assert_within_budget(name, variant, size, dtype)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16), ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", MIXES)
def test_the_other_dtypes_match_reference(name, size, dtype):
    assert_within_budget(name, next(iter(MIXES[name].variants)), size, dtype)


@pytest.mark.parametrize(
    ("name", "variant"),
    (("gated", "token"), ("gated", "dropout"), ("averaged", "token")),
)
def test_a_sum_over_thousands_of_rows_errs_no_more_than_one_over_experts(name, variant):
    assert_within_budget(name, variant, Size((12,), 24, 40, 128, 24), torch.float32)


@pytest.mark.parametrize("level", ISA_LEVELS)
def test_every_isa_level(level):
    """Some of the cases at each level."""
    run_at(
        level,
        "import torch, test_mixes\n"
        "from mixes import cases\n"
        "for name, variant, size in cases():\n"
        "    if size.K in (130, 200, 256):\n"
        "        for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "            test_mixes.assert_within_budget(name, variant, size, dtype)\n",
    )


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_gradcheck(name, variant):
    """Finite differences through the real kernels in float64."""
    inputs = make_inputs(name, variant, SMALL, torch.float64)
    names = [n for n in inputs.tensors if n not in inputs.fixed]
    constant = {n: t for n, t in inputs.tensors.items() if n in inputs.fixed}

    def function(*leaves):
        tensors = dict(zip(names, leaves, strict=True))
        return MIXES[name].function(**tensors, **constant, **inputs.options)

    leaves = [inputs.tensors[n].clone().requires_grad_() for n in names]
    with use_backend("cpu"):
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_a_gradient_alone_is_the_same(name, variant):
    """Whatever else is frozen, and so neither computed nor saved."""
    inputs = make_inputs(name, variant, Size((2, 20), 24, 40, 3, 2), torch.float32)
    leaves = [n for n in inputs.tensors if n not in inputs.fixed]
    with use_backend("cpu"):
        everything = run(MIXES[name].function, inputs)
        for only in leaves:
            frozen = inputs._replace(fixed=frozenset(inputs.tensors) - {only})
            alone = run(MIXES[name].function, frozen)[f"d{only}"]
            # The base GEMM goes first or last, whichever is cheaper.
            torch.testing.assert_close(alone, everything[f"d{only}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_same_bits_for_every_number_of_threads(name, variant):
    inputs = make_inputs(name, variant, Size((2, 140), 130, 258, 4, 6), torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            with use_backend("cpu"):
                results.append(run(MIXES[name].function, _given_base(inputs)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_a_token_alone_has_the_bits_of_the_batch(name, variant, dtype):
    if "sequence" in variant or "map" in variant or variant == "dropout":
        pytest.skip("the weights or the mask of a token depend on its place")
    inputs = make_inputs(name, variant, Size((150,), 130, 258, 4, 6), dtype)
    inputs = _given_base(inputs)
    per_token = {"x", "base_output", "weights", "intuition"}
    with use_backend("cpu"), torch.no_grad():
        whole = MIXES[name].function(**inputs.tensors, **inputs.options)
        for t in (0, 17, 149):
            alone = {n: v[t : t + 1] if n in per_token else v for n, v in inputs.tensors.items()}
            assert torch.equal(MIXES[name].function(**alone, **inputs.options)[0], whole[t])


def _given_base(inputs):
    """The frozen linear's output given: the library's GEMM promises no bits."""
    tensors = dict(inputs.tensors)
    weight, bias = tensors.pop("weight"), tensors.pop("bias")
    tensors["base_output"] = torch.nn.functional.linear(tensors["x"], weight, bias)
    return inputs._replace(tensors=tensors, options=inputs.options | {"weight": None, "bias": None})


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_inference_and_autocast(name, variant):
    """no_grad gives the bits of the graph; autocast those of the cast tensors."""
    inputs = make_inputs(name, variant, SMALL, torch.float32)
    function = MIXES[name].function
    with use_backend("cpu"):
        y = function(**{n: t.requires_grad_(n not in inputs.fixed) for n, t in
                        inputs.tensors.items()}, **inputs.options)  # fmt: skip
        with torch.no_grad():
            assert torch.equal(function(**inputs.tensors, **inputs.options), y)
            with torch.autocast("cpu", torch.bfloat16):
                low = function(**inputs.tensors, **inputs.options)
            wide = inputs.wide
            cast = {n: t if n in wide else t.bfloat16() for n, t in inputs.tensors.items()}
            assert low.dtype == torch.bfloat16
            assert torch.equal(function(**cast, **inputs.options), low)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_non_contiguous(name, variant):
    """Strided x and parameters give the bits of contiguous ones."""
    inputs = make_inputs(name, variant, Size((6, 20), 24, 40, 3, 2), torch.float32)

    def strided(t):
        return t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t)

    with use_backend("cpu"), torch.no_grad():
        want = MIXES[name].function(**inputs.tensors, **inputs.options)
        # The base GEMM sees its own operands as they were: the library promises no bits.
        for only in set(inputs.tensors) - {"weight", "x"}:
            tensors = dict(inputs.tensors) | {only: strided(inputs.tensors[only])}
            assert torch.equal(MIXES[name].function(**tensors, **inputs.options), want), only
        given = _given_base(inputs)
        want = MIXES[name].function(**given.tensors, **inputs.options | given.options)
        for only in ("x", "base_output"):
            tensors = dict(given.tensors) | {only: strided(given.tensors[only])}
            got = MIXES[name].function(**tensors, **given.options)
            assert torch.equal(got, want), only
        # Batch second in memory.
        x = given.tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(MIXES[name].function(**given.tensors | {"x": x}, **given.options), want)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_a_token_without_leading_dimensions(name, variant, backend):
    """x [K] and weights [E], or [splits, E], as x [1, K] and weights [1, E]."""
    inputs = make_inputs(name, variant, Size((1,), 24, 40, 3, 2), torch.float32)
    if MIXES[name].variants[variant].get("granularity") == "sequence":
        pytest.skip("a sequence has a length")
    leading = {"x", *(inputs.wide & {"weights", "intuition"})} - (
        {"weights", "intuition"} if "row_map" in inputs.options else set()
    )
    with use_backend(backend), torch.no_grad():
        want = MIXES[name].function(**inputs.tensors, **inputs.options)
        bare = {n: t[0] if n in leading else t for n, t in inputs.tensors.items()}
        assert torch.equal(MIXES[name].function(**bare, **inputs.options), want[0])


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("name", ("gated", "averaged", "grid"))
def test_weights_that_are_none_are_refused_by_name(name, backend):
    inputs = make_inputs(name, "token", SMALL, torch.float32)
    table = "intuition" if name == "grid" else "weights"
    with use_backend(backend):
        for wrong in ("a", [1.0], inputs.tensors[table].long()):
            with pytest.raises(TypeError, match=f"^{table}: wanted"):
                MIXES[name].function(**inputs.tensors | {table: wrong}, **inputs.options)
        with pytest.raises(ValueError, match=f"^{table}: wanted device cpu like x, got meta"):
            other = inputs.tensors | {table: inputs.tensors[table].to("meta")}
            MIXES[name].function(**other, **inputs.options)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("name", ("gated", "averaged", "grid"))
def test_a_row_map_may_have_the_shape_of_x(name, backend):
    inputs = make_inputs(name, "token", Size((2, 3), 24, 40, 3, 2), torch.float32)
    table = "intuition" if name == "grid" else "weights"
    tensors = inputs.tensors | {table: inputs.tensors[table][0]}
    rows = torch.tensor([[2, 0, 0], [1, 2, 1]], dtype=torch.int32)
    with use_backend(backend), torch.no_grad():
        got, want = (
            MIXES[name].function(**tensors, **inputs.options, row_map=row_map)
            for row_map in (rows, rows.flatten())
        )
        per_token = dict(tensors) | {table: tensors[table][rows.long()]}
        assert torch.equal(got, want)
        torch.testing.assert_close(got, MIXES[name].function(**per_token, **inputs.options))


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_compiles_whole(name, variant):
    """fullgraph with dynamic shapes, forward and backward."""
    torch._dynamo.reset()
    function = torch.compile(MIXES[name].function, fullgraph=True, dynamic=True)
    for lead in ((2, 5), (3, 9)):
        inputs = make_inputs(name, variant, Size(lead, 6, 8, 3, 2), torch.float32)
        with use_backend("cpu"):
            want = run(MIXES[name].function, inputs)
            got = run(function, inputs)
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)


OPERATOR_NAMES = (
    "gated_forward", "gated_backward", "grid_forward", "grid_backward", "averaged_forward",
    "averaged_backward", "output_gate_forward", "output_gate_backward", "shrink", "expand", "outer",
)  # fmt: skip


@pytest.fixture(scope="module")
def operator_calls():
    """Real calls of every operator, by its name, as the functions make them."""
    with use_backend("cpu"), mixes.recorded_calls(ops.of("cpu"), OPERATOR_NAMES) as calls:
        for mix, m in MIXES.items():
            for variant in m.variants:
                for dtype in (torch.float32, torch.bfloat16):
                    run(m.function, make_inputs(mix, variant, SMALL, dtype))
        x, rows = torch.randn(5, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
        functional.shrink(x, rows).sum().backward()
    return calls


@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_opcheck(name, operator_calls):
    assert operator_calls[name]
    seen = set()
    for arguments in operator_calls[name]:
        kind = tuple((a.dtype if isinstance(a, torch.Tensor) else a is None) for a in arguments)
        if kind in seen:
            continue
        seen.add(kind)
        torch.library.opcheck(
            getattr(ops.of("cpu"), name), arguments, test_utils=("test_schema", "test_faketensor")
        )
