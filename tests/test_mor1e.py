"""Intuition-MoR1E: the formula, the layer, its scores in a whole model, the encoder, files."""

import builtins
import copy
import io
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moelora_ops
from moelora_ops import MoR1EConfig, models, reference
from moelora_ops.backends import extension
from moelora_ops.intuition import IntuitionEncoder, cluster
from moelora_ops.nn import MoR1ELinear

np = pytest.importorskip("numpy")

pytestmark = pytest.mark.usefixtures("backend")
MODES = ({"rank_down": 2, "rank_up": 3}, {"rank_down": 5, "rank_up": 5, "mode": "rank1"})


def randomise(module, scale=0.5):
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            # ω̂ and β̂ stay where their sigmoids of a hundredfold are not saturated.
            tiny = name.endswith(("omega", "beta"))
            nn.init.normal_(parameter, std=0.01 if tiny else scale)
    return module


def make_layer(dtype=torch.float64, cls=MoR1ELinear, **options):
    torch.manual_seed(0)
    options = options or MODES[0]
    return randomise(cls(nn.Linear(7, 6), **options, dtype=dtype).to(dtype))


def numpy_mor1e(x, W, b, A, B, R, omega, beta, c, token, task, mode):
    """Token by token, expert by expert: what each pair (a_i, b_j) adds, and its closed gradients.

    Returns:
        y, and a function from dy to the gradients of x, A, B, R, omega, beta and c.
    """

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    w, s = sigmoid(100 * omega), sigmoid(100 * beta)
    r1, r2 = len(A), len(B)
    pairs = [(i, i) for i in range(r1)] if mode == "rank1" else list(np.ndindex(r1, r2))
    y, probs = x @ W.T + b, []
    for t in range(len(x)):
        logits = R @ x[t]
        p = np.exp(logits - logits.max())
        probs.append(p / p.sum())
        for e, (i, j) in enumerate(pairs):
            gate = token * w * probs[t][e] + task * (1 - w) * c[t, e]
            y[t] += s * gate * (A[i] @ x[t]) * B[j]

    def backward(dy):
        dx, dA, dB, dR, dc = dy @ W, 0 * A, 0 * B, 0 * R, 0 * c
        domega = dbeta = 0.0
        for t in range(len(x)):
            p, dgate = probs[t], np.zeros(len(pairs))
            for e, (i, j) in enumerate(pairs):
                gate = token * w * p[e] + task * (1 - w) * c[t, e]
                h, back = A[i] @ x[t], B[j] @ dy[t]
                dgate[e] = s * h * back
                dA[i] += s * gate * back * x[t]
                dx[t] += s * gate * back * A[i]
                dB[j] += s * gate * h * dy[t]
                dbeta += gate * h * back
            dlogits = token * w * p * (dgate - p @ dgate)
            dR += np.outer(dlogits, x[t])
            dx[t] += dlogits @ R
            dc[t] = task * (1 - w) * dgate
            domega += (dgate * (token * p - task * c[t])).sum()
        return dx, dA, dB, dR, 100 * w * (1 - w) * domega, 100 * s * (1 - s) * dbeta, dc

    return y, backward


@pytest.mark.parametrize("cls", [MoR1ELinear, reference.MoR1ELinear])
@pytest.mark.parametrize("options", MODES)
def test_formula_and_closed_gradients(cls, options):
    layer = make_layer(cls=cls, **options, token_scale=3.0, task_scale=2.0)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(4, layer.num_experts, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(4, 6, dtype=torch.float64)
    leaves = [x, layer.lora_down, layer.lora_up, layer.router, layer.omega, layer.beta, scores]
    y = layer(x, scores)
    got = torch.autograd.grad(y, leaves, dy)

    a, b, r, o, s, c = (t.detach().numpy() for t in leaves[1:])
    want, backward = numpy_mor1e(
        x.detach().numpy(), layer.base.weight.numpy(), layer.base.bias.numpy(), a, b, r, o[0], s[0],
        c, 3.0, 2.0, layer.mode,
    )  # fmt: skip
    np.testing.assert_allclose(y.detach(), want, rtol=1e-12, atol=1e-12)
    for g, w in zip(got, backward(dy.numpy()), strict=True):
        np.testing.assert_allclose(np.squeeze(g), np.squeeze(w), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cls", [MoR1ELinear, reference.MoR1ELinear])
@pytest.mark.parametrize("options", MODES)
def test_finite_differences(cls, options):
    layer = make_layer(cls=cls, **options, token_scale=3.0)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(2, layer.num_experts, dtype=torch.float64, requires_grad=True)
    names = ("lora_down", "lora_up", "router", "omega", "beta")
    parameters = [getattr(layer, name).detach().requires_grad_() for name in names]

    def run(x, scores, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, named, (x, scores))

    torch.autograd.gradcheck(run, (x, scores, *parameters))


@pytest.mark.parametrize("cls", [MoR1ELinear, reference.MoR1ELinear])
def test_a_gate_that_is_the_identity_is_lora(cls):
    """All the weight on the intuition, which pairs row i of A with row i of B, evenly."""
    r, x = 3, torch.randn(2, 5, 7, dtype=torch.float64)
    for mode, scores in (("grid", torch.eye(r).flatten()), ("rank1", torch.ones(r))):
        layer = make_layer(cls=cls, rank_down=r, rank_up=r, mode=mode, task_scale=0.5)
        with torch.no_grad():
            layer.omega.fill_(-10.0)  # ω = 0
            layer.beta.fill_(10.0)  # σ(100 β̂) = 1
        lora = 0.5 * (x @ layer.lora_down.T) @ layer.lora_up
        y = layer(x, scores.double().expand(2, -1))
        torch.testing.assert_close(y, layer.base(x) + lora)


def test_starts_equal_to_its_base_with_an_even_router():
    base = nn.Linear(7, 6).double()
    layer = MoR1ELinear(base)
    x = torch.randn(3, 7, dtype=torch.float64)
    assert torch.equal(layer(x), base(x))
    assert layer.router.count_nonzero() == layer.omega.count_nonzero() == 0
    assert not base.weight.requires_grad and layer.router.requires_grad
    # ω = β = 1/2 and 32 even experts: the gate is 1/2 + 2 c.
    with torch.no_grad():
        layer.lora_up.normal_()
    scores = torch.randn(3, 32, dtype=torch.float64)
    gate = (0.5 + 2 * scores).unflatten(-1, (4, 8))
    mixed = torch.einsum("ti,tij->tj", x @ layer.lora_down.T, gate)
    torch.testing.assert_close(layer(x, scores), base(x) + 0.5 * mixed @ layer.lora_up)


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_state_dict_and_outputs_as_the_reference(options, dtype):
    fused = make_layer(dtype, **options)
    literal = reference.MoR1ELinear(nn.Linear(7, 6), **options)
    assert literal.state_dict().keys() == fused.state_dict().keys()
    literal.double().load_state_dict(fused.state_dict())
    x, scores = torch.randn(2, 5, 7).to(dtype), torch.randn(2, fused.num_experts)
    want = literal(x.double(), scores.double())
    error = (fused(x, scores).double() - want).abs().max()
    assert error <= 16 * torch.finfo(dtype).eps * want.abs().max()


def test_from_reference_shares_parameters():
    literal = make_layer(cls=reference.MoR1ELinear, **MODES[1]).eval()
    fused = moelora_ops.fuse(literal)
    assert type(fused) is MoR1ELinear and fused.router is literal.router and not fused.training
    x, scores = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(fused(x, scores), literal(x, scores))


@pytest.mark.parametrize("lead", [(), (0,), (3,), (2, 0), (2, 4), (2, 1, 3)])
def test_any_leading_shape_with_scores_per_token(lead):
    layer = make_layer()
    x = torch.randn(*lead, 7, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(*lead, 6, dtype=torch.float64)
    y = layer(x, scores)
    assert y.shape == (*lead, 6)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_works_under_autocast():
    layer = make_layer(torch.float32)
    x, scores = torch.randn(2, 5, 7), torch.randn(2, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, scores)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x, scores), rtol=0.05, atol=0.3)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "rank_down: wanted an int of at least 1, got 0", {"rank_down": 0}),
        (ValueError, "rank_up: wanted an int of at least 1, got 2.0", {"rank_up": 2.0}),
        (ValueError, "rank_up: wanted 4 like rank_down, as mode is 'rank1', got 8",
         {"mode": "rank1"}),
        (ValueError, "mode: wanted one of .*grid.*, got 'line'", {"mode": "line"}),
        (ValueError, "token_scale: wanted a finite number, got nan", {"token_scale": float("nan")}),
        (ValueError, "task_scale: wanted a finite number, got '4'", {"task_scale": "4"}),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, options):
    base = nn.Linear(3, 3)
    for make in (lambda: MoR1ELinear(base, **options), lambda: MoR1EConfig(**options)):
        with pytest.raises(error, match=message):
            make()
    assert base.weight.requires_grad


# ---------------------------------------------------------------- scores for a whole model


class Block(nn.Module):
    def __init__(self, width=7):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 9), nn.Linear(9, width)
        self.norm = nn.LayerNorm(width)  # after the last expert, so that it asks first in backward

    def forward(self, x):
        return self.norm(x + self.down_proj(torch.tanh(self.up_proj(x))))


class Toy(nn.Module):
    """`mode`: None, or the reentrant flag of the checkpoint around each block."""

    def __init__(self, mode=None):
        super().__init__()
        self.embed = nn.Linear(7, 7)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.mode = mode

    def run(self, x):
        x = self.embed(x)
        for block in self.layers:
            x = block(x) if self.mode is None else checkpoint(block, x, use_reentrant=self.mode)
        return x

    def forward(self, x):
        return {"hidden": (self.run(x), None)}


def make_model(mode=None, implementation="fused", **options):
    torch.manual_seed(0)
    config = MoR1EConfig(2, 3, target_modules=("up_proj", "down_proj"), **options)
    model = moelora_ops.apply(Toy(mode).double(), config, implementation=implementation)
    randomise(model).embed.requires_grad_(True)  # so that reentrant checkpoints have a gradient
    return model


def loss_of(model, x):
    hidden = model(x)["hidden"][0]  # of norm 1, as LayerNorm comes last
    return (hidden * torch.linspace(1, 2, 7, dtype=hidden.dtype)).sin().sum()


def gradients(model, loss):
    parameters = [p for p in models.adapter_parameters(model) if p.requires_grad]
    return torch.autograd.grad(loss, parameters) if isinstance(loss, torch.Tensor) else None


X, Y = torch.randn(2, 2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
A, B = torch.randn(2, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def wanted(*calls):
    """Gradients of the sum of the losses of (x, scores), without checkpoints or blocks."""
    model = make_model()
    total = 0
    for x, scores in calls:
        for layer in models.adapted_layers(model):
            layer.module.forward = lambda x, m=layer.module, s=scores: MoR1ELinear.forward(
                m, x, torch.zeros(2, 6, dtype=x.dtype) if s is None else s
            )
        total = total + loss_of(model, x)
    return gradients(model, total)


def assert_equal(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


def differ(got, want):
    return any((g - w).abs().max() > 1e-6 for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_a_block_is_the_argument_for_every_layer(implementation):
    model = make_model(implementation=implementation)
    plain = loss_of(model, X)
    with moelora_ops.intuition(model, A):
        inside = loss_of(model, X)
    assert_equal(gradients(model, inside), wanted((X, A)))
    assert_equal(gradients(model, plain), wanted((X, None)))
    assert differ(wanted((X, A)), wanted((X, None)))
    assert torch.equal(loss_of(model, X), plain)


def test_blocks_nest_and_end_on_errors():
    model = make_model()
    outside = loss_of(model, X)
    with moelora_ops.intuition(model, A):
        first = loss_of(model, X)
        with moelora_ops.intuition(model, B):
            assert not torch.isclose(loss_of(model, X), first)
        with moelora_ops.intuition(model, None):
            assert torch.equal(loss_of(model, X), outside)
        with moelora_ops.intuition(model.layers[0], B):
            assert not torch.isclose(loss_of(model, X), first)
        with pytest.raises(KeyError), moelora_ops.intuition(model, B):
            raise KeyError
        assert torch.equal(loss_of(model, X), first)
    assert torch.equal(loss_of(model, X), outside)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_recompute_with_the_scores_of_their_forward(reentrant, inside):
    model = make_model(reentrant)
    with moelora_ops.intuition(model, A):
        loss = loss_of(model, X)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    parameters = list(models.adapter_parameters(model))
    assert_equal([p.grad for p in parameters], wanted((X, A)))
    held = [layer.module.ambient_scores.now for layer in models.adapted_layers(model)]
    assert all(scores.values is None for scores in held)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("calls", [(A, B), (A, None), (None, A), (B, None, A)])
@pytest.mark.parametrize("around", [None, B, "none"])
def test_calls_with_different_scores_share_a_backward(reentrant, calls, around):
    model = make_model(reentrant)
    total = 0
    for i, scores in enumerate(calls):
        x = (X, Y, X + Y)[i]
        if scores is None:
            total = total + loss_of(model, x)
        else:
            with moelora_ops.intuition(model, scores):
                total = total + loss_of(model, x)
    if around is None:
        total.backward()
    else:  # the block around a backward pass says nothing about what it recomputes
        with moelora_ops.intuition(model, None if around == "none" else around):
            total.backward()
    want = wanted(*(((X, Y, X + Y)[i], scores) for i, scores in enumerate(calls)))
    assert_equal([p.grad for p in models.adapter_parameters(model)], want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_outside_of_every_module(reentrant):
    """The blocks are called by a script, so no module encloses what is recomputed."""
    model = make_model(reentrant)
    with moelora_ops.intuition(model, A):
        hidden = model.run(X)
    (hidden * torch.linspace(1, 2, 7, dtype=hidden.dtype)).sin().sum().backward()
    assert_equal([p.grad for p in models.adapter_parameters(model)], wanted((X, A)))


def in_another_thread(call):
    """Run `call` where no forward call ran, as a GPU's backward pass does; returns its error."""
    errors = []

    def work():
        try:
            call()
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return errors


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_in_another_thread(reentrant):
    model = make_model(reentrant)
    with moelora_ops.intuition(model, A):
        total = loss_of(model, X)
    with moelora_ops.intuition(model, None):
        total = total + loss_of(model, Y)
    with moelora_ops.intuition(model, B):
        total = total + loss_of(model, X + Y)
        assert in_another_thread(total.backward) == []
    want = wanted((X, A), (Y, None), (X + Y, B))
    assert_equal([p.grad for p in models.adapter_parameters(model)], want)


def test_a_thread_that_cannot_know_the_scores_says_so():
    model = make_model(True)
    with moelora_ops.intuition(model, A):
        hidden = model.run(X)
    assert "use_reentrant=False" in in_another_thread(hidden.sum().backward)[0]


def test_a_failed_backward_leaves_no_scores_behind():
    model = make_model(False)
    with moelora_ops.intuition(model, A):
        hidden = model(X)["hidden"][0]
    before = loss_of(model, Y)
    model.layers[0].norm.weight = None  # so that the recomputation fails after its experts
    model.layers[0].norm.normalized_shape = (3,)
    with pytest.raises(RuntimeError):
        hidden.sum().backward()
    model.layers[0].norm = make_model().layers[0].norm
    with moelora_ops.intuition(model, B):
        loss_of(model, Y)
    assert torch.equal(loss_of(model, Y), before)


def test_threads_have_scores_of_their_own():
    model = make_model(False)
    want = {key: wanted((X, scores)) for key, scores in (("a", A), ("b", B), ("none", None))}
    barrier, got = threading.Barrier(3, timeout=30), {}

    def work(key, scores):
        with moelora_ops.intuition(model, scores):
            barrier.wait()
            loss = loss_of(model, X)
            barrier.wait()
        got[key] = gradients(model, loss)

    threads = [
        threading.Thread(target=work, args=args) for args in (("a", A), ("b", B), ("none", None))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key, gradient in got.items():
        assert_equal(gradient, want[key])
    assert got.keys() == want.keys()


@pytest.fixture
def compiling(backend):
    """Once is enough for what the back ends share, and compiling is slow."""
    if backend == "reference" and not extension.why_missing():
        pytest.skip("compiled with the kernels")


@pytest.mark.parametrize(("reentrant", "how"), [(None, "eager"), (False, "aot_eager")])
def test_compiled_around_everything(compiling, reentrant, how):
    model = make_model(reentrant)
    compiled = torch.compile(model, fullgraph=True, backend=how)
    want = {scores: wanted((X, scores)) for scores in (A, B, None)}
    for i, scores in enumerate((A, None, B, A, None)):
        with (
            # Other scores are other inputs, not other graphs.
            torch._dynamo.config.patch(error_on_recompile=i > 1),
            moelora_ops.intuition(compiled, scores),
        ):
            loss = loss_of(compiled, X)
        assert_equal(gradients(model, loss), want[scores])


@pytest.mark.parametrize("reentrant", [False, True])
def test_compiled_inside_checkpoints(compiling, reentrant):
    model = make_model(reentrant)
    for block in model.layers:
        block.compile(backend="eager")
    for scores in (A, B, None):
        with moelora_ops.intuition(model, scores):
            loss = loss_of(model, X)
        loss.backward()
        assert_equal([p.grad for p in models.adapter_parameters(model)], wanted((X, scores)))
        model.zero_grad()


def test_packed_sequences():
    model = make_model()
    rows = torch.tensor([1, 1, 0, 1, 0], dtype=torch.int32)
    with moelora_ops.intuition(model, A, row_map=rows):
        packed = model.run(X[0])
    with moelora_ops.intuition(model, A[rows.long()]):
        torch.testing.assert_close(model.run(X[0]), packed)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"scores: wanted shape \[batch, 6\], one per expert of layers.0.up_proj, got "
         r"\[2, 5\]", lambda: {"scores": A[:, :5]}),
        (ValueError, r"scores: wanted shape \[batch, 6\].* got \[6\]", lambda: {"scores": A[0]}),
        (TypeError, "scores: wanted a floating-point tensor or None, got list",
         lambda: {"scores": [1.0]}),
        (TypeError, "scores: wanted a floating-point tensor or None, got torch.int64",
         lambda: {"scores": A.long()}),
        (ValueError, "row_map: wanted None, as there are no scores",
         lambda: {"scores": None, "row_map": torch.zeros(3)}),
    ],
)  # fmt: skip
def test_bad_scores(error, message, arguments):
    with pytest.raises(error, match=message), moelora_ops.intuition(make_model(), **arguments()):
        pass


def test_scores_of_another_batch():
    model = make_model()
    message = r"intuition: wanted shape \[2, 5, 6\] \(per token\) or \[2, 6\] \(per sequence\), got"
    with moelora_ops.intuition(model, A[:1]), pytest.raises(ValueError, match=message):
        model(X)
    model(X)


def test_models_without_such_layers():
    no_layers = pytest.raises(ValueError, match="model: has no MoR1E layers")
    with no_layers, moelora_ops.intuition(Toy(), A):
        pass
    no_model = pytest.raises(TypeError, match=r"model: wanted a torch.nn.Module, got list")
    with no_model, moelora_ops.intuition([], A):
        pass


def test_models_can_be_copied_and_pickled_inside_a_block():
    model = make_model()
    outside = loss_of(model, X)
    with moelora_ops.intuition(model, A):
        inside = loss_of(model, X)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(loss_of(twin, X), outside)  # a copy is in no block
            with moelora_ops.intuition(twin, A):
                assert torch.equal(loss_of(twin, X), inside)


# ---------------------------------------------------------------- the encoder


def groups(clusters=4, each=6, width=5):
    """Embeddings around orthogonal directions, of very different norms."""
    random = torch.Generator().manual_seed(3)
    directions = torch.eye(width)[:clusters].repeat_interleave(each, 0)
    noise = 0.05 * torch.randn(directions.shape, generator=random)
    return (directions + noise) * torch.logspace(-2, 2, len(directions))[:, None]


def test_clusters_are_found_whatever_the_norms():
    pytest.importorskip("sklearn")
    centroids = cluster(groups(), 4)
    assert centroids.dtype == torch.float32
    torch.testing.assert_close(centroids.norm(dim=-1), torch.ones(4))
    encoder = IntuitionEncoder(4, 5)
    encoder.centroids.copy_(centroids)
    scores = encoder(groups())
    assert scores.abs().max() <= 1 + 1e-6
    own = scores.argmax(-1).reshape(4, 6)
    assert (own == own[:, :1]).all() and len(own[:, 0].unique()) == 4
    assert scores.amax(-1).min() > 0.95
    cosine = nn.functional.cosine_similarity(groups()[:, None], centroids, dim=-1)
    torch.testing.assert_close(scores, cosine)
    assert torch.equal(cluster(groups(), 4), centroids)


def test_a_learned_map_goes_from_clusters_to_experts():
    encoder = IntuitionEncoder(4, 5, experts=4)
    encoder.centroids.copy_(torch.eye(5)[:4])
    plain = IntuitionEncoder(4, 5)
    plain.centroids.copy_(torch.eye(5)[:4])
    embeddings = torch.randn(3, 5)
    assert torch.equal(encoder(embeddings), plain(embeddings))  # starts as the identity
    for clusters, experts in ((3, 7), (7, 3)):
        encoder = IntuitionEncoder(clusters, 5, experts)
        assert encoder.map.shape == (experts, clusters)
        assert encoder.map.sum(0).min() >= 1 and encoder.map.sum(1).min() >= 1
        encoder.centroids.normal_()
        encoder(embeddings).sum().backward()
        assert encoder.map.grad.count_nonzero()


def test_the_map_learns_through_the_layers():
    model = make_model(centroids=torch.eye(5)[:3], learned_map=True)
    encoder = model.moelora_companions.encoder
    with moelora_ops.intuition(model, encoder(torch.randn(2, 5))):
        loss_of(model, X).backward()
    assert encoder.map.grad.count_nonzero()


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"embeddings: wanted shape \[instructions, width\], got \[4\]",
         lambda: cluster(torch.ones(4), 2)),
        ("embeddings: wanted finite rows that are not zero", lambda: cluster(torch.zeros(3, 2), 2)),
        ("embeddings: wanted finite rows that are not zero",
         lambda: cluster(torch.full((3, 2), float("nan")), 2)),
        (r"clusters: wanted an int in 1..1, the number of different embeddings, got 2",
         lambda: cluster(torch.ones(3, 2), 2)),
        (r"clusters: wanted an int in 1..2, .* got 0", lambda: cluster(torch.eye(2), 0)),
        ("clusters: wanted an int of at least 1, got 0", lambda: IntuitionEncoder(0, 2)),
        ("experts: wanted an int of at least 1, got 0", lambda: IntuitionEncoder(2, 2, 0)),
        (r"embeddings: wanted shape \[batch, 2\], got \[3, 4\]",
         lambda: IntuitionEncoder(2, 2)(torch.ones(3, 4))),
        (r"centroids: wanted shape \[clusters, width\], got \[3\]",
         lambda: MoR1EConfig(centroids=torch.ones(3))),
        ("centroids: wanted finite floating-point rows that are not zero",
         lambda: MoR1EConfig(centroids=torch.zeros(32, 3))),
        ("centroids: wanted 32, one per expert, or learned_map=True; got 31",
         lambda: MoR1EConfig(centroids=torch.ones(31, 3))),
        ("learned_map: wanted False, as there are no centroids to map",
         lambda: MoR1EConfig(learned_map=True)),
    ],
)  # fmt: skip
def test_bad_encoders(message, call):
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match=message):
        call()


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'moelora-ops\[intuition\]'"):
        cluster(torch.eye(2), 2)


# ---------------------------------------------------------------- whole models and files


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_centroids_are_saved_with_the_adapter(tmp_path, implementation, learned):
    pytest.importorskip("safetensors")
    centroids = torch.randn(4 if learned else 6, 5)
    saved = make_model(centroids=centroids, learned_map=learned, implementation=implementation)
    moelora_ops.save_adapter(saved, tmp_path)
    torch.manual_seed(0)
    model = moelora_ops.load_adapter(Toy().double(), tmp_path, implementation=implementation)
    encoders = [m.moelora_companions.encoder for m in (saved, model)]
    assert encoders[1].centroids.dtype == torch.float32
    torch.testing.assert_close(
        encoders[1].centroids, nn.functional.normalize(centroids.double(), dim=-1).float()
    )
    embeddings, losses = torch.randn(2, 5), []
    for m, encoder in zip((saved, model), encoders, strict=True):
        with moelora_ops.intuition(m, encoder(embeddings)):
            losses.append(loss_of(m, X))
    assert torch.equal(*losses)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert ("moelora_companions.encoder.map" in trainable) == learned
    assert len(trainable) == 20 + learned


def test_other_centroids_do_not_fit(tmp_path):
    pytest.importorskip("safetensors")
    moelora_ops.save_adapter(make_model(centroids=torch.randn(6, 5)), tmp_path)
    for other in (make_model(), make_model(centroids=torch.randn(6, 4))):
        with pytest.raises(ValueError, match=r"another model: moelora_companions.encoder"):
            moelora_ops.load_adapter(other, tmp_path)


def test_parameter_counts_of_the_released_configuration():
    """LLaMA-2-13B, 4 x 8: 24.17 M in A and B, 57.0 M in the routers, two scalars per linear."""
    shapes = [(5120, 5120)] * 4 + [(5120, 13824)] * 2 + [(13824, 5120)]
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    with torch.device("meta"):
        model = nn.ModuleList(
            nn.ModuleDict(
                {name: nn.Linear(*shape) for name, shape in zip(names, shapes, strict=True)}
            )
            for _ in range(40)
        )
    moelora_ops.apply(model, MoR1EConfig())
    count = {"lora": 0, "router": 0, "scalar": 0}
    for layer in models.adapted_layers(model):
        count["lora"] += layer.module.lora_down.numel() + layer.module.lora_up.numel()
        count["router"] += layer.module.router.numel()
        count["scalar"] += layer.module.omega.numel() + layer.module.beta.numel()
    assert count == {"lora": 24_166_400, "router": 57_016_320, "scalar": 560}
    new = models.adapter_parameters(model)
    assert sum(p.numel() for p in new) == sum(count.values())


# ---------------------------------------------------------------- the benchmark


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("mode", "ranks", "floors"),
    [
        # (K (r1 + G) + N r2) / (K N), and three times that over two such products.
        ("grid", (4, 8), (44 * 64 / 64**2, 3 * 44 / 128)),
        ("rank1", (16, 16), (48 * 64 / 64**2, 3 * 48 / 128)),
    ],
)
def test_the_benchmark_checks_and_measures(dtype, mode, ranks, floors):
    from moelora_ops.bench import METHODS
    from moelora_ops.bench.mor1e import MoR1ECase
    from moelora_ops.bench.runner import Settings, run_case

    method = METHODS["mor1e"]
    case = MoR1ECase("small", dtype, 96, 64, 64, *ranks, mode)
    for direction, floor in zip(case.directions, floors, strict=True):
        record = run_case(method, case, direction, Settings(rounds=3, seconds=0.1, compile=False))
        assert "refused" not in record, record["refused"]
        assert record["floors"]["dense"] == pytest.approx(floor)
        ours = {"ours", "ours-library"}
        assert record["variants"].keys() == {"base", "touch", "stacked", "eager", *ours}
    # What a training step keeps beside x: hidden and logits in float32, no less, no more than the
    # target, unless the back end is the reference, which keeps everything.
    if record["backend"] == "cpu":
        assert record["variants"]["ours"]["saved_bytes"] <= method.memory_target(case)


def test_the_named_cases_of_the_benchmark():
    from moelora_ops.bench import METHODS

    cases = METHODS["mor1e"].cases
    assert {case.tokens for case in cases} == {1024, 512, 64, 8, 1}
    assert {(case.mode, case.rank_down, case.rank_up) for case in cases} == {
        ("grid", 4, 8), ("rank1", 32, 32),
    }  # fmt: skip
    assert {case.dtype for case in cases} == {"bf16", "fp32"} and len(cases) == 20
    assert {(case.in_features, case.out_features) for case in cases} == {(2048, 2048)}
