"""Linear heads without logits, against float64 formulas of the full logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kl_kernels
from kl_kernels.partitioned.operators import IMPLEMENTATIONS
from kl_kernels.partitioned.tiles import Head, bytes_of, plan_tiles

BACKENDS = ("reference", "cpu")
V, D, REF_D = 203, 10, 7
SMALL = 12_000  # bytes: tiles of some rows and columns
FUNCTIONS = ("stats", "kl")
FEATURES = {
    "plain": {},
    "bias": {"bias": True, "ref_bias": True},
    "scaled": {"temperature": 0.7, "ref_temperature": 1.3, "logit_scale": 0.4},
    "everything": {
        "bias": True,
        "ref_bias": False,
        "temperature": 0.8,
        "softcap": 3.0,
        "ref_softcap": 5.0,
        "logit_scale": 1.7,
        "ref_logit_scale": 0.6,
    },
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiles of a few numbers: on a busy machine, waiting for a second thread takes most time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Case:
    """Tensors of both heads, leaves where they are the policy's."""

    def __init__(self, shape=(2, 19), dtype=torch.float32, seed=0, vocab_size=V, **options):
        g = torch.Generator().manual_seed(seed)

        def normal(*size):
            return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

        self.hidden = normal(*shape, D).requires_grad_()
        self.weight = normal(vocab_size, D).requires_grad_()
        self.bias = normal(vocab_size).requires_grad_() if options.pop("bias", False) else None
        self.ref_hidden, self.ref_weight = normal(*shape, REF_D), normal(vocab_size, REF_D)
        self.ref_bias = normal(vocab_size) if options.pop("ref_bias", False) else None
        self.token_ids = torch.randint(vocab_size, shape, generator=g)
        self.upstream = torch.randn(5, *shape, generator=g, dtype=torch.float64)
        self.options = options
        self.mask = None

    @property
    def leaves(self):
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def ours(self, function, **options):
        options = self.options | {"bias": self.bias, "mask": self.mask} | options
        if function == "stats":
            options = {n: o for n, o in options.items() if not n.startswith("ref_")}
            return kl_kernels.linear_token_stats(
                self.hidden, self.weight, self.token_ids, **options
            )
        return kl_kernels.linear_token_kl(
            *(self.hidden, self.weight, self.ref_hidden, self.ref_weight, self.token_ids),
            **({"ref_bias": self.ref_bias} | options),
        )

    def truth(self):
        """logprob, ref_logprob, kl, forward_kl, entropy of full float64 logits."""
        o = self.options
        log_p = log_softmax(
            (self.hidden, self.weight, self.bias),
            o.get("logit_scale", 1.0),
            o.get("softcap"),
            o.get("temperature", 1.0),
        )
        log_q = log_softmax(
            (self.ref_hidden, self.ref_weight, self.ref_bias),
            o.get("ref_logit_scale", o.get("logit_scale", 1.0)),
            o.get("ref_softcap"),
            o.get("ref_temperature", o.get("temperature", 1.0)),
        )
        token = self.token_ids[..., None]
        p, q = log_p.exp(), log_q.exp()
        return (
            log_p.gather(-1, token).squeeze(-1),
            log_q.gather(-1, token).squeeze(-1),
            (p * (log_p - log_q)).sum(-1),
            (q * (log_q - log_p)).sum(-1),
            -(p * log_p).sum(-1),
        )

    def upstream_of(self, outputs):
        return self.upstream if len(outputs) == 5 else self.upstream[[0, 4]]

    def loss(self, outputs):
        """A mix of all outputs."""
        terms = [(g * o).sum() for g, o in zip(self.upstream_of(outputs), outputs)]
        return torch.stack(terms).sum()

    def gradients(self, outputs):
        return torch.autograd.grad(self.loss(outputs), self.leaves)


def log_softmax(head, logit_scale, softcap, temperature):
    hidden, weight, bias = (None if t is None else t.double() for t in head)
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits / temperature, -1)


def chosen(function, truth):
    return (truth[0], truth[4]) if function == "stats" else truth


def assert_near(ours, truth, tolerance):
    """Relative to the largest entry: sums over tokens and vocabulary cancel."""
    assert ours.shape == truth.shape
    error = (ours.double() - truth.double()).abs().max() / truth.double().abs().max()
    assert error < tolerance, float(error)


class Operators(TorchDispatchMode):
    """Counts what runs inside of heads' operators, and remembers the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.counts, self.largest = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self:
            if func._opname in IMPLEMENTATIONS:
                return IMPLEMENTATIONS[func._opname](*args)
            if (parts := func.decompose(*args, **(kwargs or {}))) is not NotImplemented:
                return parts
        result = func(*args, **(kwargs or {}))
        self.counts[func._opname] = self.counts.get(func._opname, 0) + 1
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result

    def products(self):
        return self.counts.get("mm", 0) + self.counts.get("addmm_", 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("memory_budget", [SMALL, 1 << 20])
def test_values_and_gradients_are_those_of_full_logits(backend, function, features, memory_budget):
    case = Case(**FEATURES[features])
    ours = case.ours(function, backend=backend, memory_budget=memory_budget)
    truth = chosen(function, case.truth())
    for value, exact in zip(ours, truth):
        assert value.dtype == torch.float32
        assert_near(value, exact, 2e-6)
    for gradient, exact in zip(case.gradients(ours), case.gradients(truth)):
        assert_near(gradient, exact, 5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab_size", [1, 2, 64, 65])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3, 4)])
def test_any_shape(backend, vocab_size, shape):
    case = Case(shape, vocab_size=vocab_size, bias=True)
    ours = case.ours("kl", backend=backend, memory_budget=SMALL)
    assert all(value.shape == shape for value in ours)
    for value, exact in zip(ours, case.truth()):
        torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=2e-6)
    for gradient, exact in zip(case.gradients(ours), case.gradients(case.truth())):
        torch.testing.assert_close(gradient.double(), exact.double(), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("no_row", ["no tokens", "all masked"])
def test_no_rows(backend, function, no_row):
    case = Case((2, 0) if no_row == "no tokens" else (2, 19), bias=True)
    case.mask = torch.zeros(case.token_ids.shape)
    ours = case.ours(function, backend=backend)
    assert all(torch.equal(value, torch.zeros(case.token_ids.shape)) for value in ours)
    for gradient, leaf in zip(case.gradients(ours), case.leaves):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_rows_are_not_multiplied(backend, function, dtype):
    case = Case(dtype=dtype, **FEATURES["everything"])
    case.mask = torch.rand(2, 19, generator=torch.Generator().manual_seed(3)) < 0.6
    truth = [torch.where(case.mask, t, 0.0) for t in chosen(function, case.truth())]
    exact = case.gradients(truth)
    case.hidden.data[~case.mask] = torch.nan
    case.ref_hidden[~case.mask] = torch.nan
    case.token_ids[~case.mask] = -100
    case.upstream[:, ~case.mask] = torch.nan
    ours = case.ours(function, backend=backend, memory_budget=SMALL)
    for value, true in zip(ours, truth):
        assert torch.equal(value[~case.mask], torch.zeros(int((~case.mask).sum())))
        assert_near(value, true, 2e-6)
    pairs = [(o, g.float()) for o, g in zip(ours, case.upstream_of(ours)) if o.requires_grad]
    outputs, upstream = zip(*pairs)
    gradients = torch.autograd.grad(outputs, case.leaves, upstream)
    assert torch.equal(gradients[0][~case.mask], torch.zeros_like(gradients[0][~case.mask]))
    for gradient, true in zip(gradients, exact):
        assert_near(gradient, true, 5e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_budget", [SMALL, 1 << 20])
def test_tiles_and_sums_are_not_rounded_to_the_dtype(backend, dtype, memory_budget):
    """Values to float32, gradients to one rounding (half an ulp of each entry)."""
    case = Case(shape=(4, 32), dtype=dtype, bias=True, ref_bias=True)
    ours = case.ours("kl", backend=backend, memory_budget=memory_budget)
    for value, exact in zip(ours, case.truth()):
        assert value.dtype == torch.float32
        assert_near(value, exact, 2e-6)
    wide = [leaf.detach().double().requires_grad_() for leaf in case.leaves]
    gradients = case.gradients(ours)
    case.hidden, case.weight, case.bias = wide
    for gradient, exact in zip(gradients, case.gradients(case.truth())):
        assert gradient.dtype == dtype
        half_ulp = exact.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).tiny
        assert ((gradient.double() - exact).abs() <= half_ulp + 2e-6 * exact.abs().max()).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_may_differ(backend):
    case = Case(bias=True, ref_bias=True)
    case.hidden = case.hidden.detach().bfloat16().requires_grad_()
    case.bias = case.bias.detach().half().requires_grad_()
    case.ref_weight = case.ref_weight.half()
    case.ref_bias = case.ref_bias.bfloat16()
    ours = case.ours("kl", backend=backend, memory_budget=SMALL)
    for value, exact in zip(ours, case.truth()):
        assert_near(value, exact, 2e-6)
    for gradient, exact, leaf in zip(
        case.gradients(ours), case.gradients(case.truth()), case.leaves
    ):
        assert gradient.dtype == leaf.dtype
        assert_near(gradient, exact, 5e-6 if leaf.dtype == torch.float32 else 2**-8)


def test_a_float64_policy_beside_a_bfloat16_reference():
    case = Case(dtype=torch.float64)
    case.ref_hidden, case.ref_weight = case.ref_hidden.bfloat16(), case.ref_weight.bfloat16()
    ours = case.ours("kl", memory_budget=4 * SMALL)
    for value, exact in zip(ours, case.truth()):
        assert value.dtype == torch.float64
        assert_near(value, exact, 1e-6)  # the reference's tile is float32


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck_in_float64(function):
    case = Case((2, 2), dtype=torch.float64, vocab_size=7, **FEATURES["everything"])
    case.mask = torch.tensor([[True, True], [False, True]])

    def outputs(hidden, weight, bias):
        case.hidden, case.weight, case.bias = hidden, weight, bias
        return tuple(o for o in case.ours(function, memory_budget=1500) if o.requires_grad)

    assert torch.autograd.gradcheck(outputs, tuple(case.leaves))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_tiling_changes_rounding_only(backend, function):
    case = Case((3, 11), **FEATURES["everything"])
    results = []
    for memory_budget in (1500, SMALL, 50_000, 1 << 22):
        ours = case.ours(function, backend=backend, memory_budget=memory_budget)
        results.append((*ours, *case.gradients(ours)))
    for other in results[1:]:
        for value, first in zip(other, results[0]):
            assert_near(value, first, 1e-6)


@pytest.mark.parametrize("n_rows", [0, 1, 7, 1000])
@pytest.mark.parametrize("vocab_size", [1, 100, 5000])
@pytest.mark.parametrize("memory_budget", [2000, 30_000, 1 << 20, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_cover_everything_once_and_fit(n_rows, vocab_size, memory_budget, dtype):
    weight = torch.empty(vocab_size, 20, dtype=dtype)
    heads = [Head(weight.new_empty(1, n_rows, 20), weight, None)] * 2
    per = bytes_of(heads, gradient=True, weight_gradient=True)
    plan = plan_tiles(n_rows, vocab_size, per, memory_budget)
    rows = [i for s in plan.row_slices() for i in range(s.start, s.stop)]
    columns = [i for s in plan.column_slices() for i in range(s.start, s.stop)]
    assert rows == list(range(n_rows))
    assert columns == list(range(vocab_size))
    copies = 3 * 20 * 4 * plan.columns * (dtype != torch.float32)
    copied = 2 * 20 * 4 * plan.rows * (dtype != torch.float32)
    assert 8 * plan.rows * plan.columns + copies + copied <= memory_budget
    assert all(s.stop - s.start <= plan.rows for s in plan.row_slices())
    assert all(s.stop - s.start <= plan.columns for s in plan.column_slices())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_larger_than_a_tile_or_a_gradient_is_made(function, dtype):
    n_rows, vocab_size, budget = 600, 3000, 200_000
    case = Case((2, n_rows // 2), dtype, vocab_size=vocab_size)
    outputs_bytes = 4 * n_rows * 20  # states: nine numbers per token, merged in float64
    with Operators() as forward:
        ours = case.ours(function, backend="cpu", memory_budget=budget)
    assert forward.largest <= max(budget, outputs_bytes, case.weight.nbytes)
    with Operators() as backward:
        case.gradients(ours)
    assert backward.largest <= max(budget, outputs_bytes, case.weight.nbytes)
    assert 20 * max(forward.largest, backward.largest) < 4 * n_rows * vocab_size


@pytest.mark.parametrize("function", FUNCTIONS)
def test_tiles_are_allocated_once(function):
    case = Case((2, 50), torch.bfloat16, vocab_size=3000)
    with Operators() as few, torch.no_grad():
        case.ours(function, backend="cpu", memory_budget=100_000)
    with Operators() as many, torch.no_grad():
        case.ours(function, backend="cpu", memory_budget=20_000)
    assert many.counts["mm"] > 3 * few.counts["mm"]
    assert many.counts["new_empty"] == few.counts["new_empty"]


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (0, 1, 1)])
def test_each_product_only_if_somebody_needs_it(needs):
    case = Case(bias=True)
    for leaf, needed in zip(case.leaves, needs):
        leaf.requires_grad_(bool(needed))
    leaves = [leaf for leaf in case.leaves if leaf.requires_grad]
    with Operators() as forward:
        ours = case.ours("kl", backend="cpu", memory_budget=SMALL)
    assert forward.products() == 2 * forward.counts["fold_part"]
    with Operators() as backward:
        gradients = torch.autograd.grad(ours.kl.sum(), leaves)
    n_tiles = backward.counts["token_kl_backward_"]
    assert n_tiles > 4
    # Per tile: the logits of both models, then hidden and weight.
    assert backward.products() == n_tiles * (2 + sum(needs[:2]))
    for gradient, exact in zip(gradients, torch.autograd.grad(case.truth()[2].sum(), leaves)):
        assert_near(gradient, exact, 2e-6)


def test_without_a_kl_gradient_the_reference_is_not_multiplied_again():
    case = Case()
    ours = case.ours("kl", backend="cpu")
    case.ref_hidden.data.fill_(torch.nan)
    with Operators() as backward:
        gradients = torch.autograd.grad((ours.logprob - ours.entropy).sum(), case.leaves)
    assert backward.products() == 3
    assert "token_stats_backward_" in backward.counts
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_constant_costs_no_backward_and_the_graph_can_be_kept():
    case = Case()
    ours = case.ours("kl", backend="cpu")
    first = torch.autograd.grad(ours.kl.sum(), case.leaves, retain_graph=True)
    second = torch.autograd.grad(ours.kl.sum(), case.leaves)
    assert all(torch.equal(f, s) for f, s in zip(first, second))
    with torch.no_grad():
        assert all(o.grad_fn is None for o in case.ours("kl"))
    assert not case.ours("kl").ref_logprob.requires_grad


def test_second_derivatives_are_refused():
    case = Case()
    (gradient,) = torch.autograd.grad(
        case.ours("stats").logprob.sum(), case.hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_views_of_hidden_states_and_weights(function):
    case = Case()
    expected = case.ours(function, memory_budget=SMALL)
    expected_grads = case.gradients(expected)
    hidden = torch.full((2, 21, D), torch.nan)
    hidden[:, 1:-1] = case.hidden.detach()
    weight = torch.full((D + 2, V + 3), torch.nan)
    weight[1:-1, 2:-1] = case.weight.detach().T
    hidden.requires_grad_(), weight.requires_grad_()
    leaves = hidden, weight
    case.hidden, case.weight = hidden[:, 1:-1], weight[1:-1, 2:-1].T
    ours = case.ours(function, memory_budget=SMALL)
    for value, other in zip(ours, expected):
        assert_near(value, other, 1e-6)
    grad_hidden, grad_weight = torch.autograd.grad(case.loss(ours), leaves)
    assert_near(grad_hidden[:, 1:-1], expected_grads[0], 1e-6)
    assert_near(grad_weight[1:-1, 2:-1].T, expected_grads[1], 1e-6)


def test_tied_weights_collect_both_gradients():
    case = Case((2, 5), vocab_size=50)

    def loss(weight, statistics):
        embedded = torch.tanh(torch.nn.functional.embedding(case.token_ids, weight))
        case.hidden, case.weight = embedded, weight
        logprob, *_, entropy = statistics()
        return (logprob + entropy).sum()

    weight = case.weight
    ours = torch.autograd.grad(loss(weight, lambda: case.ours("stats")), weight)[0]
    exact = torch.autograd.grad(loss(weight, case.truth), weight)[0]
    assert_near(ours, exact, 2e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    case = Case(bias=True)

    def kl(hidden, weight, bias):
        case.hidden, case.weight, case.bias = hidden, weight, bias
        return case.ours("kl", memory_budget=SMALL).kl

    leaves = case.leaves
    plain = torch.autograd.grad(kl(*leaves).sum(), leaves)
    checkpoint(kl, *leaves, use_reentrant=use_reentrant).sum().backward()
    assert all(torch.equal(leaf.grad, g) for leaf, g in zip(leaves, plain))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_autocast_does_not_reach_the_tiles(function):
    case = Case(**FEATURES["everything"])
    expected = case.ours(function)
    expected_grads = case.gradients(expected)
    with torch.autocast("cpu", torch.bfloat16):
        ours = case.ours(function)
        gradients = case.gradients(ours)
    for value, other in zip((*ours, *gradients), (*expected, *expected_grads)):
        assert torch.equal(value, other)


BAD_ARGUMENTS = {
    "hidden is a list": ({"hidden": [1.0]}, TypeError, "hidden is a list"),
    "hidden of integers": (
        {"hidden": torch.ones(2, 9, D, dtype=torch.long)}, TypeError,
        "hidden has dtype torch.int64; accepted: float32",
    ),
    "a weight for another width": (
        {"weight": torch.ones(V, D + 1)}, ValueError, r"weight has shape \(203, 11\); hidden of",
    ),
    "no vocabulary": ({"weight": torch.ones(0, D)}, ValueError, "at least one row"),
    "a bias for another vocabulary": (
        {"bias": torch.ones(V + 1)}, ValueError, r"bias has shape \(204,\); weight of shape",
    ),
    "a reference of another vocabulary": (
        {"ref_weight": torch.ones(V + 1, REF_D)}, ValueError, "ref_weight has 204 rows, weight 203",
    ),
    "a reference of other tokens": (
        {"ref_hidden": torch.ones(2, 8, REF_D)}, ValueError, r"ref_hidden has shape \(2, 8, 7\)",
    ),
    "a trained reference": (
        {"ref_weight": torch.ones(V, REF_D, requires_grad=True)}, ValueError,
        "ref_weight requires grad, but the reference is a constant: detach it",
    ),
    "a reference with a trained bias": (
        {"ref_bias": torch.ones(V, requires_grad=True)}, ValueError, "ref_bias requires grad",
    ),
    "trained reference states": (
        {"ref_hidden": torch.ones(2, 9, REF_D, requires_grad=True)}, ValueError,
        "ref_hidden requires grad",
    ),
    "tokens of another shape": (
        {"token_ids": torch.zeros(2, 8, dtype=torch.long)}, ValueError,
        r"token_ids has shape \(2, 8\); hidden of shape \(2, 9, 10\) needs \(2, 9\)",
    ),
    "tokens that are floats": (
        {"token_ids": torch.zeros(2, 9)}, TypeError, "token_ids has dtype torch.float32; accepted",
    ),
    "a token outside the vocabulary": (
        {"token_ids": torch.full((2, 9), V)}, ValueError,
        "token_ids holds 203 at an unmasked position; accepted: 0 to 202",
    ),
    "a mask of another shape": ({"mask": torch.ones(2, 8)}, ValueError, "mask has shape"),
    "logit_scale of 0": ({"logit_scale": 0.0}, ValueError, "logit_scale is 0.0; it must be"),
    "a negative softcap": ({"ref_softcap": -1.0}, ValueError, "ref_softcap is -1.0; it must"),
    "no temperature": ({"ref_temperature": 0.0}, ValueError, "ref_temperature is 0.0; it must"),
    "no memory": ({"memory_budget": 0}, ValueError, "memory_budget is 0; it must be"),
    "hardly any memory": (
        {"memory_budget": 7}, ValueError, r"memory_budget is 7; accepted: from \d+ bytes on",
    ),
    "an unknown backend": ({"backend": "tpu"}, ValueError, "backend is 'tpu'; accepted"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_ARGUMENTS)
def test_errors_name_argument_value_and_what_is_accepted(what):
    changed, error, message = BAD_ARGUMENTS[what]
    case = Case((2, 9))
    arguments = {
        "hidden": case.hidden,
        "weight": case.weight,
        "ref_hidden": case.ref_hidden,
        "ref_weight": case.ref_weight,
        "token_ids": case.token_ids,
    }
    with pytest.raises(error, match=message):
        kl_kernels.linear_token_kl(**(arguments | changed))


@pytest.mark.parametrize("function", ["kl", "jsd"])
def test_the_rows_under_a_mask_are_found_once(function, monkeypatch):
    """On a GPU finding them synchronises."""
    found, nonzero = [], torch.Tensor.nonzero
    monkeypatch.setattr(
        torch.Tensor, "nonzero", lambda t, **how: (found.append(t), nonzero(t, **how))[1]
    )
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4)
    mask, ids = torch.tensor([[True, False, True]] * 2), torch.ones(2, 3, dtype=torch.long)
    heads = hidden, weight, hidden.detach() + 1, weight
    if function == "kl":
        loss = kl_kernels.linear_token_kl(*heads, ids, mask).kl.sum()
    else:
        loss = kl_kernels.linear_token_jsd(*heads, mask).sum()
    loss.backward()
    assert len(found) == 1
