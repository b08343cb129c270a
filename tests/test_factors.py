"""The mathematics of the factors: averages, pi, damped inverses, their invariances, and numbers at the edge."""

from __future__ import annotations

import math

import dense
import pytest
import torch
from stacks import Bench, rows_of, sample_of, spoiled, stack_of
from torch import nn

from kfac_triton import KFAC
from kfac_triton.joint import stacked
from kfac_triton.layer import Layer
from kfac_triton.linalg import factors
from kfac_triton.operations import layout
from kfac_triton.operations.layout import Layout

F64 = torch.float64


def spd(d, seed=0, batch=(), scale=1.0):
    """Random, positive definite, condition about 100, no symmetry between its axes."""
    X = dense.randn(*batch, 3 * d, d, seed=seed)
    return scale * X.mT @ X / (3 * d)


def eye(d):
    return torch.eye(d, dtype=F64)


def inverses(A, G, damping, **options):
    found = factors.damped_inverses(A, G, damping, **options)
    assert found is not None
    return found


def as_tensor(value, dtype=F64):
    return torch.tensor(value, dtype=dtype)


# E9: damped inverses.

# 1 x 1 sides are those of a network with one output; 7 and 4 differ, so that no axis can be exchanged.
SIZES = [(7, 4), (4, 7), (1, 5), (5, 1), (1, 1)]


@pytest.mark.parametrize("damping", [0.0, 1e-12, 1e-3, 1.0, 1e8])
@pytest.mark.parametrize("scales", [(1, 1), (1e3, 1e-4)], ids=["one scale", "far apart"])  # pi is 1, and 3e3
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_inverses_of_the_dense_damped_matrices(sizes, scales, damping):
    A, G = spd(sizes[0], 1, scale=scales[0]), spd(sizes[1], 2, scale=scales[1])
    A_inv, G_inv = inverses(A, G, damping)
    for value, expected in zip((A_inv, G_inv), dense.damped_inverses(A, G, damping), strict=True):
        dense.assert_exact(value / expected.abs().max(), expected / expected.abs().max())
    gamma, pi = damping**0.5, ((A.trace() / len(A)) / (G.trace() / len(G))) ** 0.5
    damped = torch.kron(G + gamma / pi * eye(len(G)), A + gamma * pi * eye(len(A)))
    dense.assert_exact(torch.kron(G_inv, A_inv) @ damped, eye(len(damped)))


@pytest.mark.parametrize("kind", ["float", "0-d", "0-d float32"])
def test_damping_may_be_a_tensor(kind):
    A, G = spd(4, 1), spd(3, 2)
    damping = {"float": 0.25, "0-d": as_tensor(0.25), "0-d float32": torch.tensor(0.25)}[kind]
    for value, expected in zip(inverses(A, G, damping), dense.damped_inverses(A, G, 0.25), strict=True):
        dense.assert_exact(value, expected)


@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_float32_factors_keep_the_precision_of_their_conditioning(scale):
    """Error against float64 at most 20 eps times the condition of the damped matrix."""
    A, G = spd(30, 1), spd(20, 2, scale=scale)
    found = inverses(A.float(), G.float(), 1e-3 * scale)
    for value, expected in zip(found, dense.damped_inverses(A, G, 1e-3 * scale), strict=True):
        condition = torch.linalg.cond(expected)
        assert value.dtype == torch.float32
        assert dense.relative_error(value.double() * scale, expected * scale) <= 20 * 2**-24 * condition


def test_groups_are_inverted_each_with_its_own_pi():
    """Also beside a group without any data, whose inverses are I / gamma."""
    A, G = spd(5, 1, (3,)) * as_tensor([1.0, 1e4, 1.0])[:, None, None], spd(2, 2, (3,))
    A[2] = 0
    A_inv, G_inv = inverses(A, G, 0.1)
    for i in range(2):
        for value, expected in zip((A_inv[i], G_inv[i]), dense.damped_inverses(A[i], G[i], 0.1), strict=True):
            dense.assert_exact(value, expected)
    dense.assert_exact(A_inv[2], eye(5) / 0.1**0.5)
    dense.assert_exact(G_inv[2], eye(2) / 0.1**0.5)


# E20: what pi makes invariant; scalars and zeros.


def preconditioned(A, G, damping, grad):
    A_inv, G_inv = inverses(A, G, damping)
    return G_inv @ grad @ A_inv


@pytest.mark.parametrize("c", [1e-6, 3.0, 1e9])
@pytest.mark.parametrize("damping", [1e-4, 10.0])
def test_moving_a_scale_from_one_factor_to_the_other_changes_nothing(c, damping):
    A, G, grad = spd(5, 1), spd(3, 2), dense.randn(3, 5)
    dense.assert_exact(preconditioned(c * A, G / c, damping, grad), preconditioned(A, G, damping, grad))


# E21, first half.


@pytest.mark.parametrize("c", [1e-6, 3.0, 1e9])
def test_scaling_the_loss_changes_nothing(c):
    """The gradient, the Fisher (all of it in G) and the damping are c times what they were."""
    A, G, grad = spd(5, 1), spd(3, 2), dense.randn(3, 5)
    dense.assert_exact(preconditioned(A, c * G, c * 0.1, c * grad), preconditioned(A, G, 0.1, grad))


def test_scalar_factors():
    """pi = sqrt(a / g), so a + pi gamma = sqrt(a / g) (sqrt(a g) + gamma)."""
    a, g, gamma = 4.0, 9.0, 0.5
    A_inv, G_inv = inverses(as_tensor([[a]]), as_tensor([[g]]), gamma**2)
    dense.assert_exact(A_inv, as_tensor([[1 / (a + (a / g) ** 0.5 * gamma)]]))
    dense.assert_exact(G_inv, as_tensor([[1 / (g + (g / a) ** 0.5 * gamma)]]))


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("zero", ["A", "G", "both"])
def test_a_vanishing_factor_leaves_the_damping(zero, diagonal):
    """The Fisher of the layer is zero then, and both inverses are I / gamma."""
    A, G = spd(4, 1) * (zero == "G"), spd(3, 2) * (zero == "A")
    if diagonal:
        A, G = A.diagonal().clone(), G.diagonal().clone()
    for inverse in inverses(A, G, 0.04, diagonal_A=diagonal, diagonal_G=diagonal):
        expected = torch.full_like(inverse, 5.0) if diagonal else eye(len(inverse)) * 5
        dense.assert_exact(inverse, expected)


@pytest.mark.parametrize("size", [1e-39, 1e-44, 2e-38])
def test_a_factor_that_fades_into_denormals_still_has_an_inverse(size):
    """G of a network that has learnt its data: 1 / G overflows. What is left of the Fisher is its damping."""
    A, G = spd(4, 1).float(), torch.eye(3) * size
    A_inv, G_inv = inverses(A, G, 0.04)
    assert is_finite((A_inv, G_inv))
    if size < 1e-38:
        dense.assert_exact(torch.kron(G_inv, A_inv).double(), torch.eye(12, dtype=F64) / 0.04, 1e-5)


# Sides with a diagonal.


@pytest.mark.parametrize("damping", [1e-6, 1.0])
@pytest.mark.parametrize("sides", ["A", "G", "AG"])
def test_diagonal_sides_are_dense_ones_without_off_diagonals(sides, damping):
    A, G = spd(6, 1), spd(4, 2, scale=100.0)
    A = torch.diag(A.diagonal()) if "A" in sides else A
    G = torch.diag(G.diagonal()) if "G" in sides else G
    A_inv, G_inv = inverses(
        A.diagonal().clone() if "A" in sides else A,
        G.diagonal().clone() if "G" in sides else G,
        damping,
        diagonal_A="A" in sides,
        diagonal_G="G" in sides,
    )
    expected_A, expected_G = dense.damped_inverses(A, G, damping)
    dense.assert_exact(torch.diag(A_inv) if "A" in sides else A_inv, expected_A)
    dense.assert_exact(torch.diag(G_inv) if "G" in sides else G_inv, expected_G)


# Inputs of 6 (+1 with the bias), outputs of 3: limits that cut one side, both, or by the bias alone.
@pytest.mark.parametrize(
    ("bias", "limit", "cut"), [(True, 7, ""), (True, 6, "A"), (False, 6, ""), (True, 3, "A"), (True, 2, "AG")]
)
def test_a_side_far_wider_than_max_factor_dim_keeps_its_diagonal(bias, limit, cut, monkeypatch):
    monkeypatch.setattr(layout, "MOST_BLOCKS", 1)
    model, batches = (
        dense.random_model(nn.Linear(6, 3, bias=bias), nn.Tanh()),
        [dense.randn(8, 6, seed=s) for s in (1, 2)],
    )
    full, limited = (
        dense.kfac_factors(model, *batches, likelihood="categorical", max_factor_dim=m)["0"] for m in (8192, limit)
    )
    for side in "AG":
        dense.assert_exact(limited[side], full[side].diagonal() if side in cut else full[side])


@pytest.mark.parametrize("groups", [1, 2])
def test_a_wide_convolution_keeps_diagonals(groups, monkeypatch):
    monkeypatch.setattr(layout, "MOST_BLOCKS", 1)
    conv = nn.Conv2d(4, 4, 3, groups=groups)
    model, x = dense.random_model(conv, nn.Tanh(), nn.Flatten()), dense.randn(3, 4, 4, 4)
    full, limited = (dense.kfac_factors(model, x, max_factor_dim=m)["0"] for m in (8192, 10))
    dense.assert_exact(limited["A"], full["A"].diagonal(dim1=-2, dim2=-1))  # 36 / groups + 1 wide
    dense.assert_exact(limited["G"], full["G"])


# E19: the running average.


@pytest.mark.parametrize("max_factor_dim", [8192, 1])
@pytest.mark.parametrize("decay", [0.0, 0.6, 0.99])  # none; reached at the third update; never reached
def test_the_average_follows_the_closed_form(decay, max_factor_dim):
    """Weights prod over later k of beta_k, times 1 - beta_j, with beta_k = min(1 - 1/k, decay)."""
    model, options = (
        dense.random_model(nn.Linear(5, 3)),
        {"max_factor_dim": max_factor_dim, "likelihood": "categorical"},
    )
    batches = [dense.randn(6, 5, seed=s) for s in range(6)]
    alone = [dense.kfac_factors(model, x, **options)["0"] for x in batches]
    betas = [min(1 - 1 / k, decay) for k in range(1, 7)]
    weights = [(1 - betas[j]) * math.prod(betas[j + 1 :]) for j in range(6)]
    assert math.isclose(sum(weights), 1)
    averaged = dense.kfac_factors(model, *batches, factor_decay=decay, **options)["0"]
    for side in "AG":
        dense.assert_exact(averaged[side], sum(w * f[side] for w, f in zip(weights, alone, strict=True)))


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_factor_interval_takes_every_nth_batch(interval):
    model, batches = dense.random_model(nn.Linear(5, 3)), [dense.randn(6, 5, seed=s) for s in range(7)]
    expected = dense.kfac_factors(model, *batches[::interval], factor_decay=0.5)
    dense.assert_factors_equal(
        dense.kfac_factors(model, *batches, factor_decay=0.5, factor_interval=interval), expected
    )


def test_accumulated_batches_are_one_batch():
    """Several forward and backward passes before a step: their rows together, also with batches of different sizes."""
    model, x = dense.random_model(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), dense.randn(9, 5)
    optimizer = KFAC(model, likelihood="categorical", fisher="exact", lr=0.0, compile=False, factor_fraction=1.0)
    for part in x.split([2, 3, 4]):
        model(part).sum().backward()
    optimizer.step()
    dense.assert_factors_equal(optimizer.factors(), dense.kfac_factors(model, x, likelihood="categorical"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_models_have_float32_factors(dtype):
    """Sums in float32 of rows in the model's precision: here of small integers, which every dtype holds exactly."""
    model, x = nn.Sequential(nn.Linear(5, 3)).to(dtype), (torch.arange(300) % 7 - 3.0).reshape(60, 5)
    factors_ = dense.kfac_factors(model, x.to(dtype))["0"]
    a = torch.cat([x, torch.ones(60, 1)], 1)
    assert factors_["A"].dtype == factors_["G"].dtype == torch.float32
    torch.testing.assert_close(factors_["A"], a.T @ a / 60)
    torch.testing.assert_close(factors_["G"], torch.eye(3))


# E21 and E22: changes of coordinates.


class Reparametrised(nn.Module):
    """A tanh network in other coordinates: s = Phi W' (Omega [a; 1]) for every layer."""

    def __init__(self, weights, Phis, Omegas):
        super().__init__()
        pairs = zip(weights, Phis, Omegas, strict=True)
        self.weights = nn.ParameterList(torch.linalg.inv(P) @ W @ torch.linalg.inv(O) for W, P, O in pairs)
        self.Phis, self.Omegas = Phis, Omegas

    def forward(self, x):
        for i, (W, Phi, Omega) in enumerate(zip(self.weights, self.Phis, self.Omegas, strict=True)):
            a = torch.cat([torch.tanh(x) if i else x, x.new_ones(len(x), 1)], 1)
            x = nn.functional.linear(a @ Omega.T, W) @ Phi.T
        return x


# d_in + 1 and d_out of two layers; 40 examples make every factor nonsingular under the gaussian likelihood.
DIMS = [(5, 3), (4, 2)]


def network(seed=0):
    return [dense.randn(o, i, seed=seed + o) / i**0.5 for i, o in DIMS], dense.randn(40, 4), dense.randn(40, 2, seed=2)


def identities():
    return [eye(o) for _, o in DIMS], [eye(i) for i, _ in DIMS]


def path(model, x, y, steps, **options):
    """The outputs of the network after each of several steps."""
    options = {
        "lr": 0.3,
        "rule": "kl",
        "kl_clip": None,
        "likelihood": "gaussian",
        "fisher": "exact",
        "inverse_interval": 1,
        **options,
    }
    optimizer = KFAC(model, compile=False, factor_fraction=1.0, **options)
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().sum(-1).mean()).backward()
        optimizer.step()
        outputs.append(model(x).detach())
    return outputs


@pytest.mark.parametrize("kl_clip", [None, 1e-2])  # <V, grad> is invariant too
def test_updates_do_not_depend_on_the_coordinates(kl_clip):
    """W' = Phi^-1 W Omega^-1 at damping 0, momentum included: the same path in function space."""
    weights, x, y = network()
    Phis = [eye(o) + 0.3 * dense.randn(o, o, seed=8) for _, o in DIMS]
    Omegas = [eye(i) + 0.3 * dense.randn(i, i, seed=9) for i, _ in DIMS]
    models = Reparametrised(weights, *identities()), Reparametrised(weights, Phis, Omegas)
    plain, changed = (path(m, x, y, 5, damping=0.0, momentum=0.7, kl_clip=kl_clip) for m in models)
    for one, other in zip(plain, changed, strict=True):
        dense.assert_exact(other, one, tolerance=1e-9)  # five inverses of two condition numbers
    assert dense.relative_error(plain[-1], plain[0]) > dense.DIFFERENT
    damped, changed = (path(m, x, y, 5, damping=0.1, kl_clip=kl_clip) for m in models)
    assert dense.relative_error(changed[-1], damped[-1]) > dense.DIFFERENT  # the damping has its coordinates


def test_whitened_coordinates_turn_it_into_gradient_descent():
    """With Omega = A^-1/2 and Phi = G^-1/2 both factors are I, and a step of K-FAC is one of gradient descent there."""
    weights, x, y = network()
    model = Reparametrised(weights, *identities())
    found = dense.kfac_factors(model, x)

    def inverse_root(F):
        values, vectors = torch.linalg.eigh(F)
        return vectors @ torch.diag(values**-0.5) @ vectors.T

    Omegas = [inverse_root(found[f"weights.{i}"]["A"]) for i in range(2)]
    Phis = [inverse_root(found[f"weights.{i}"]["G"]) for i in range(2)]
    white = Reparametrised(weights, Phis, Omegas)
    for pair in dense.kfac_factors(white, x).values():
        for F in pair.values():
            dense.assert_exact(F, eye(len(F)), tolerance=1e-9)
    white.zero_grad()
    (0.5 * (white(x) - y).square().sum(-1).mean()).backward()
    with torch.no_grad():
        for W in white.weights:
            W -= 0.3 * W.grad
    (after,) = path(model, x, y, 1, damping=0.0)
    dense.assert_exact(after, white(x), tolerance=1e-9)


# Numbers at the edge: finite inverses, or None; never an exception.

SINGULAR = torch.outer(*[torch.arange(1.0, 6.0, dtype=F64)] * 2)  # rank one


def is_finite(found):
    return found is not None and all(bool(torch.isfinite(F).all()) for F in found)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [(1e30, 1e30), (1e-30, 1e-30), (1e30, 1e-30), (1e-30, 1e30)], ids=str)
def test_huge_and_tiny_factors(scale, dtype):
    """Their product leaves float32's range; damping and inverses don't."""
    A, G = spd(5, 1), spd(3, 2)
    damping = 0.01 * min(max(scale[0] * scale[1], 1e-34), 1e34)
    found = inverses((A * scale[0]).to(dtype), (G * scale[1]).to(dtype), damping)
    for value, expected, s in zip(
        found, dense.damped_inverses(A * scale[0], G * scale[1], damping), scale, strict=True
    ):
        assert dense.relative_error(value.double() * s, expected * s) <= (1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("damping", [0.0, 1e-12, 1e-3, 1e3])
@pytest.mark.parametrize("scale", [1e30, 1e-30, 1.0])
def test_any_scale_at_any_damping_has_finite_float32_inverses(scale, damping, diagonal):
    A, G = (spd(5, 1) * scale).float(), (spd(3, 2) * scale).float()
    if diagonal:
        A, G = A.diagonal().clone(), G.diagonal().clone()
    assert is_finite(factors.damped_inverses(A, G, damping, diagonal_A=diagonal, diagonal_G=diagonal))


@pytest.mark.parametrize("damping", [0.0, 1e-30, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kind", ["rank one", "zero row", "zero", "more columns than rows"])
def test_singular_factors_have_finite_inverses(kind, dtype, damping):
    thin = dense.randn(2, 5)
    A = {
        "rank one": SINGULAR,
        "zero row": torch.diag(as_tensor([3.0, 0.0, 1.0, 1.0, 2.0])),
        "zero": torch.zeros(5, 5, dtype=F64),
        "more columns than rows": thin.T @ thin / 2,
    }[kind]
    assert is_finite(factors.damped_inverses(A.to(dtype), SINGULAR.to(dtype), damping))


@pytest.mark.parametrize("side", ["A", "G"])
@pytest.mark.parametrize("place", ["everywhere", "diagonal", "lower triangle"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_factors_that_are_not_finite_have_no_inverses(dtype, value, place, side):
    bad, good = spd(4, 1).to(dtype), spd(4, 2).to(dtype)
    if place == "everywhere":
        bad.fill_(value)
    elif place == "diagonal":
        bad[1, 1] = value
    else:
        bad[3, 1] = bad[1, 3] = value
    found = factors.damped_inverses(*((bad, good) if side == "A" else (good, bad)), 0.1)
    assert found is None or is_finite(found)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_diagonals_that_are_not_finite_have_no_inverses(value):
    bad, good = spd(4, 1).diagonal().clone(), spd(4, 2)
    bad[2] = value
    found = factors.damped_inverses(bad, good, 0.1, diagonal_A=True)
    assert found is None or is_finite(found)


# The escalation: own precision, double precision, then the damping raised tenfold, six times at most.


def test_escalation_in_its_written_order(monkeypatch):
    tried = []

    def never(F, d):
        tried.append((F.dtype, float(d)))

    monkeypatch.setattr(factors, "_cholesky_inverse_", never)
    A, G = torch.eye(3), torch.eye(2)  # mean diagonals 1, so d is sqrt(damping)
    assert factors.damped_inverses(A, G, 0.25) is None
    assert [dtype for dtype, _ in tried] == [torch.float32, *[F64] * 7]
    torch.testing.assert_close([d for _, d in tried], [0.5, 0.5, *(0.5 * 10.0**k for k in range(1, 7))])
    tried.clear()
    assert factors.damped_inverses(A.double(), G.double(), 0.25) is None
    torch.testing.assert_close([d for _, d in tried], [0.5 * 10.0**k for k in range(7)])  # no second precision


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_singular_factor_without_damping_gets_some(dtype):
    """diag(2, 0) has no Cholesky factor in any precision; the first raised damping is 10 eps of its mean diagonal."""
    A = torch.diag(torch.tensor([2.0, 0.0], dtype=dtype))
    A_inv, G_inv = inverses(A, torch.eye(3, dtype=dtype), 0.0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(A_inv, torch.diag(torch.tensor([1 / (2 + 10 * eps), 1 / (10 * eps)], dtype=dtype)))
    torch.testing.assert_close(G_inv, torch.eye(3, dtype=dtype))


def test_double_precision_rescues_what_float32_cannot_factorise():
    """Blocks [[17, b], [b, c]] of determinant 1, exact in float32: the second pivot, 1 / 17, drowns in the rounding of
    b^2 / 17, which leaves about every second one below zero, so that some block fails in whatever order a library
    multiplies.

    One more entry makes the mean diagonal 2^23, so that normalising is exact too.
    """
    bs = [b for b in range(16888, 0, -1) if (b * b + 1) % 17 == 0][:24]
    cs = [(b * b + 1) // 17 for b in bs]
    blocks = [torch.tensor([[17.0, b], [b, c]]) for b, c in zip(bs, cs, strict=True)]
    A = torch.block_diag(*blocks, torch.tensor([49 * 2.0**23 - 24 * 17 - sum(cs)]))
    assert A.diagonal().double().mean() == 2**23
    assert torch.linalg.cholesky_ex(A / 2**23)[1] > 0
    A_inv, _ = inverses(A, torch.eye(2), 0.0)
    dense.assert_exact(A_inv.double(), torch.linalg.inv(A.double()), tolerance=1e-6)


def test_an_indefinite_factor_ends_without_inverses():
    """Further below zero than six tenfold rises of float64's rounding error reach."""
    assert factors.damped_inverses(torch.diag(as_tensor([2.0, -1e-3])), eye(2), 0.0) is None
    assert is_finite(factors.damped_inverses(torch.diag(torch.tensor([2.0, -1e-3])), torch.eye(2), 0.0))


def structure_with(pairs, dtype=F64):
    """The structure of a stack of layers with these factors."""
    (d_out, d_in), count = (len(pairs[0][1]), len(pairs[0][0])), len(pairs)
    layers = [Layer(nn.Parameter(torch.zeros(d_out, d_in, dtype=dtype)), None, Layout("linear")) for _ in range(count)]
    (stack,) = stacked(layers)
    structure = Bench(stack).structure
    for i, (A, G) in enumerate(pairs):
        structure.A.values[i].copy_(A)
        structure.G.values[i].copy_(G)
    return structure


def test_there_are_no_inverses_before_data():
    bench = Bench(stack_of("linear", 2))
    samples = [sample_of(layer, rows_of(layer, i)) for i, layer in enumerate(bench.stack.layers)]
    bench.update_([samples[0], spoiled(samples[1])], damping=[0.1, 0.1])
    assert bench.refresh_([0.1, 0.1]) == [True]
    assert bench.structure.ready == [True, False]
    assert ["A_inv" in bench.state(i) for i in range(2)] == [True, False]


@pytest.mark.parametrize("together", [1, 96])
def test_without_new_inverses_the_last_ones_stay(together, monkeypatch):
    """Those of that layer; its neighbours in the stack get new ones."""
    monkeypatch.setattr(factors, "TOGETHER", together)
    structure = structure_with([(spd(4, 1), spd(3, 2)), (spd(4, 3), spd(3, 4)), (spd(4, 5), spd(3, 6))])
    assert structure.refresh_([0, 1, 2], [0.1] * 3) == [True] * 3
    kept = structure.A.inverse.clone(), structure.G.inverse.clone()
    structure.A.values[1].fill_(math.nan)
    assert structure.refresh_([0, 1, 2], [0.2] * 3) == [True, False, True]
    assert structure.ready == [True] * 3
    for side, last in zip((structure.A, structure.G), kept, strict=True):
        assert torch.equal(side.inverse[1], last[1])
        assert not torch.equal(side.inverse[0], last[0]) and not torch.equal(side.inverse[2], last[2])


@pytest.mark.parametrize("together", [1, 96])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_layers_of_a_stack_have_the_inverses_that_each_has_alone(dtype, together, monkeypatch):
    """But for rounding: each with its own damping; a factor that vanishes, and a layer that is not due, among them."""
    monkeypatch.setattr(factors, "TOGETHER", together)
    pairs = [(spd(5, 2 * i), spd(4, 2 * i + 1, scale=10.0**i)) for i in range(5)]
    pairs[3] = (torch.zeros(5, 5), pairs[3][1])
    structure = structure_with(pairs, dtype)
    damping = [0.1 * (i + 1) for i in range(5)]
    assert structure.refresh_([0, 1, 3, 4], damping) == [True] * 4
    assert structure.ready == [True, True, False, True, True]
    assert not structure.A.inverse[2].any()
    for i in (0, 1, 3, 4):
        alone = factors.damped_inverses(pairs[i][0].to(dtype), pairs[i][1].to(dtype), damping[i])
        torch.testing.assert_close((structure.A.inverse[i], structure.G.inverse[i]), alone)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_sides_inverted_together_are_those_inverted_alone(dtype):
    """But for rounding: of equal widths and others, with a factor that vanishes; each has memory of its own."""
    pairs = [(spd(5, 1), spd(4, 2)), (spd(5, 3), spd(5, 4)), (spd(3, 5), spd(4, 6)), (torch.zeros(5, 5), spd(5, 7))]
    pairs = [(A.to(dtype), G.to(dtype)) for A, G in pairs]
    found = factors.all_damped_inverses(
        [factors.Pair(A, G, 0.1 * i, factors.shape_of(A), factors.shape_of(G)) for i, (A, G) in enumerate(pairs, 1)]
    )
    alone = [factors.damped_inverses(A, G, 0.1 * i) for i, (A, G) in enumerate(pairs, 1)]
    torch.testing.assert_close(found, alone)
    inverses_of_all = [F for both in found for F in both]
    assert all(F.untyped_storage().nbytes() == F.nbytes for F in inverses_of_all)


@pytest.mark.parametrize("wide", [False, True])
def test_narrow_sides_of_a_stack_share_one_factorisation(wide, monkeypatch):
    """Neighbours that are due together; wide ones would be copied for it."""
    batches = []
    inverses_ = factors.inverses

    def counted(F, *strengths):
        batches.append(tuple(F.shape))
        return inverses_(F, *strengths)

    monkeypatch.setattr(factors, "inverses", counted)
    d = factors.TOGETHER + int(wide)
    structure = structure_with([(spd(d, 1), spd(4, 2))] * 4)
    structure.refresh_([0, 1, 3], [0.1] * 4)
    runs = [2, 1] if not wide else [1, 1, 1]
    assert batches == [(n, *size) for n in runs for size in ((d, d), (4, 4))]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_side_without_an_inverse_leaves_those_it_was_inverted_with_alone(dtype):
    """In double precision it has none at all; in single, what comes of more digits and more damping."""
    pairs = [(spd(4, 1), spd(3, 2)), (torch.diag(as_tensor([2.0, -1e-3, 1.0, 1.0])), spd(3, 3)), (spd(4, 4), spd(3, 5))]
    structure = structure_with(pairs, dtype)
    alone = [factors.damped_inverses(A.to(dtype), G.to(dtype), 0.0) for A, G in pairs]
    assert (alone[1] is None) == (dtype == F64)
    assert structure.refresh_([0, 1, 2], [0.0] * 3) == [True, alone[1] is not None, True]
    for i in range(3):
        if alone[i] is not None:
            torch.testing.assert_close((structure.A.inverse[i], structure.G.inverse[i]), alone[i])
