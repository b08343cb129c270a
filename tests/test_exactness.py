"""kron(G, A) against the dense Fisher block, wherever theory says that they are equal, and where it says they are not.

Exactness needs A or G to be the same for every row: deep linear networks under a gaussian likelihood (G constant), and
single data points (one row). Everything is float64, relative error at most 1e-10 in the max norm.
"""

from __future__ import annotations

import copy
import itertools

import dense
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_triton import KFAC

# Two and four layers; one output, several; a layer wider than its input and one narrower.
LINEAR_NETS = {"6-3-1": (6, 3, 1), "5-4-3": (5, 4, 3), "4-3-3-3-2": (4, 3, 3, 3, 2)}
BATCHES = [(6,), (2, 5), (1, 7)]  # plain; with positions; positions of a single example


def linear_net(dims, bias=True):
    return dense.random_model(*(nn.Linear(i, o, bias=bias) for i, o in itertools.pairwise(dims)))


def net(activation, dims=(5, 4, 4, 3)):
    """Depth 3: the middle layer has a nonlinearity on either side."""
    layers = [m for i, o in itertools.pairwise(dims) for m in (nn.Linear(i, o), activation())]
    return dense.random_model(*layers[:-1])


def assert_all_exact(model, x, factors, **options):
    errors = dense.block_errors(model, x, factors, **options)
    assert all(error <= dense.EXACT for error in errors.values()), errors


# E1: deep linear networks, gaussian.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("dims", LINEAR_NETS.values(), ids=LINEAR_NETS)
def test_deep_linear_is_exact(dims, batch, bias):
    model, x = linear_net(dims, bias), dense.randn(*batch, dims[0])
    assert_all_exact(model, x, dense.kfac_factors(model, x))


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_deep_linear_with_a_frozen_bias(batch):
    model, x = linear_net((5, 4, 3)), dense.randn(*batch, 5)
    model[0].bias.requires_grad_(False)
    factors = dense.kfac_factors(model, x)
    dense.assert_exact(dense.kron(factors["0"]), dense.fisher_block(model, x, "0.weight"))
    dense.assert_exact(dense.kron(factors["1"]), dense.fisher_block(model, x, "1.weight", "1.bias"))


def test_deep_linear_with_a_frozen_weight():
    """No block stands for a bias alone: it falls back; the other layers don't notice."""
    model, x = linear_net((4, 3, 3, 2)), dense.randn(6, 4)
    expected = dense.kfac_factors(model, x)
    model[1].weight.requires_grad_(False)
    optimizer = KFAC(model, likelihood="gaussian", fisher="exact", lr=0.0, compile=False, factor_fraction=1.0)
    model(x).sum().backward()
    optimizer.step()
    dense.assert_factors_equal(optimizer.factors(), {name: expected[name] for name in ("0", "2")})
    assert optimizer.coverage() == {
        **{f"{layer}.{part}": "linear" for layer in "02" for part in ("weight", "bias")},
        "1.bias": "fallback",
    }


def shuffled(model):
    return list(reversed(list(model.parameters())))


def split(model):
    biases = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": biases, "lr": 0.1}, {"params": [p for p in model.parameters() if p.dim() == 2]}]


@pytest.mark.parametrize("params", [shuffled, split])
def test_the_order_of_parameters_does_not_matter(params):
    model, x = linear_net((4, 3, 3, 2)), dense.randn(2, 5, 4)
    expected = dense.kfac_factors(model, x)
    dense.assert_factors_equal(dense.kfac_factors(copy.deepcopy(model), x), expected)
    options = {"lr": 0.0, "likelihood": "gaussian", "fisher": "exact", "compile": False, "factor_fraction": 1.0}
    optimizer = KFAC(model, params(model), **options)
    model(x).sum().backward()
    optimizer.step()
    dense.assert_factors_equal(optimizer.factors(), expected)


@pytest.mark.parametrize("fisher", ["exact", "mc"])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_the_reduction_of_the_loss_does_not_matter(batch, fisher):
    model, x = linear_net((5, 4, 3)), dense.randn(*batch, 5)
    y = dense.randn(*batch, 3, seed=2)
    mean, summed = (
        dense.kfac_factors(model, x, fisher=fisher, loss=lambda z, r=r: F.mse_loss(z, y, reduction=r))
        for r in ("mean", "sum")
    )
    dense.assert_factors_equal(mean, summed, tolerance=0.0)


# E12: one layer.


@pytest.mark.parametrize("bias", [True, False])
def test_one_linear_layer(bias):
    """FOOF: G = I and A = E[a a^T]."""
    model, x = linear_net((5, 3), bias), dense.randn(7, 5)
    factors = dense.kfac_factors(model, x)["0"]
    a = torch.cat([x, x.new_ones(7, 1)], 1) if bias else x
    dense.assert_exact(factors["G"], torch.eye(3, dtype=torch.float64))
    dense.assert_exact(factors["A"], a.T @ a / 7)


# E2: a single data point, any nonlinearity and likelihood.


@pytest.mark.parametrize("likelihood", dense.LIKELIHOODS)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.ReLU])
def test_a_single_data_point_is_exact(activation, likelihood):
    model, x = net(activation), dense.randn(1, 5)
    factors = dense.kfac_factors(model, x, likelihood=likelihood)
    assert_all_exact(model, x, factors, likelihood=likelihood)


@pytest.mark.parametrize("likelihood", dense.LIKELIHOODS)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.ReLU])
def test_a_nonlinear_batch_is_not_exact(activation, likelihood):
    """Negative control: in a batch the rows a and g are not independent, and kron(G, A) is an approximation."""
    model, x = net(activation), dense.randn(6, 5)
    factors = dense.kfac_factors(model, x, likelihood=likelihood)
    errors = dense.block_errors(model, x, factors, likelihood=likelihood)
    assert min(errors["0"], errors["2"]) > dense.DIFFERENT, errors


# Entries of a mean of g g^T over n samples have a standard error of sqrt((kurtosis - 1) / n) at most, in units of the
# largest variance; kurtosis <= 7 for the moderate probabilities (> 0.15) of these nets. Five standard errors.
N_SAMPLES = 40_000
CLT = 5 * (6 / N_SAMPLES) ** 0.5


@pytest.mark.parametrize("updates", [1, 8])
@pytest.mark.parametrize("likelihood", dense.LIKELIHOODS)
def test_mc_converges_to_the_exact_factors(likelihood, updates):
    """The single point many times over: targets differ between the copies, and from update to update."""
    model, x = net(nn.Tanh), dense.randn(1, 5)
    batch = x.expand(N_SAMPLES // updates, 5)
    factors = dense.kfac_factors(model, *[batch] * updates, likelihood=likelihood, fisher="mc", factor_decay=0.9999)
    exact = dense.kfac_factors(model, x, likelihood=likelihood)
    for name, pair in factors.items():
        dense.assert_exact(pair["A"], exact[name]["A"])
        assert dense.relative_error(pair["G"], exact[name]["G"]) < CLT


def test_mc_draws_anew_in_every_update_and_is_reproducible():
    model, x = net(nn.Tanh), dense.randn(20, 5)
    once, again, twice = (
        dense.kfac_factors(model, *[x] * k, likelihood="categorical", fisher="mc", seed=3)["0"]["G"] for k in (1, 1, 2)
    )
    other = dense.kfac_factors(model, x, likelihood="categorical", fisher="mc", seed=4)["0"]["G"]
    assert torch.equal(once, again)
    assert dense.relative_error(twice, once) > dense.DIFFERENT
    assert dense.relative_error(other, once) > dense.DIFFERENT


# E2, empirical: gradients of the user's own loss, its scale divided out.

Y = dense.randn(1, 3, seed=5)
BITS = (Y > 0).double()
CLASS = torch.tensor([2])
# (likelihood, loss, loss_scale): the user's loss = loss_scale * mean nll over loss terms. Each for one data point.
LOSSES = {
    "mse mean": ("gaussian", lambda z: F.mse_loss(z, Y), 2 / 3),
    "mse sum": ("gaussian", lambda z: F.mse_loss(z, Y, reduction="sum"), 2.0),
    "half squares": ("gaussian", lambda z: 0.5 * (z - Y).square().sum(), 1.0),
    "cross-entropy": ("categorical", lambda z: F.cross_entropy(z, CLASS), 1.0),
    "cross-entropy times 5": ("categorical", lambda z: 5 * F.cross_entropy(z, CLASS), 5.0),
    "bce mean": ("bernoulli", lambda z: F.binary_cross_entropy_with_logits(z, BITS), 1 / 3),
    "bce sum": ("bernoulli", lambda z: F.binary_cross_entropy_with_logits(z, BITS, reduction="sum"), 1.0),
}


def empirical_block(model, x, weight, bias, loss):
    """Outer product of the gradient of one term's nll."""
    parameters = dict(model.named_parameters())
    g_weight, g_bias = torch.autograd.grad(loss(model(x)), [parameters[weight], parameters[bias]])
    gradient = torch.cat([g_weight, g_bias[:, None]], 1).flatten()
    return torch.outer(gradient, gradient)


@pytest.mark.parametrize("batches", [1, 2, 3])
@pytest.mark.parametrize("case", LOSSES)
def test_empirical_of_a_single_data_point_is_exact(case, batches):
    """`batches` > 1: the same point in an accumulated step, the loss divided by their number as users do."""
    likelihood, loss, loss_scale = LOSSES[case]
    model, x = net(nn.Tanh), dense.randn(1, 5)
    options = {"likelihood": likelihood, "fisher": "empirical", "loss_scale": loss_scale}
    optimizer = KFAC(model, lr=0.0, compile=False, factor_fraction=1.0, **options)
    for _ in range(batches):
        (loss(model(x)) / batches).backward()
    optimizer.step()
    factors = optimizer.factors()
    optimizer.close()
    for name, pair in dense.linear_and_conv_layers(model).items():
        expected = empirical_block(model, x, *pair, lambda z: loss(z) / loss_scale)
        dense.assert_exact(dense.kron(factors[name]), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empirical_of_a_batch_by_definition(reduction):
    """6 examples with 2 positions each in two accumulated batches of 3; one linear layer, whose g are known."""
    model, x, y = linear_net((4, 3)), dense.randn(6, 2, 4), dense.randn(6, 2, 3, seed=2)
    scale = {"mean": 2 / 3, "sum": 2.0 * 12}[reduction]  # of the loss over all twelve terms
    optimizer = KFAC(
        model, lr=0.0, compile=False, likelihood="gaussian", fisher="empirical", loss_scale=scale, factor_fraction=1.0
    )
    for part in (slice(0, 3), slice(3, 6)):
        loss = F.mse_loss(model(x[part]), y[part], reduction=reduction)
        (loss / 2 if reduction == "mean" else loss).backward()
    optimizer.step()
    a = torch.cat([x, x.new_ones(6, 2, 1)], -1).flatten(0, 1)
    g = (model(x) - y).detach().flatten(0, 1)
    factors = optimizer.factors()["0"]
    dense.assert_exact(factors["A"], a.T @ a / 12)
    dense.assert_exact(factors["G"], g.T @ g / 12)


# E3: shared weights.


class MeanOverSequence(nn.Module):
    """Mean over all axes but the first and the last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).mean(1)


@pytest.mark.parametrize("N", [2, 7])
def test_expand_is_exact_with_outputs_at_every_position(N):
    model, x = linear_net((5, 4, 3)), dense.randn(N, 4, 8, 5)
    assert_all_exact(model, x, dense.kfac_factors(model, x, weight_sharing="expand"))


@pytest.mark.parametrize("N", [1, 2, 7])
def test_reduce_is_exact_when_the_sequence_is_averaged(N):
    model = dense.random_model(nn.Linear(5, 4), nn.Linear(4, 3), MeanOverSequence())
    x = dense.randn(N, 4, 8, 5)
    assert_all_exact(model, x, dense.kfac_factors(model, x, weight_sharing="reduce"))


@pytest.mark.parametrize("N", [1, 7])
def test_expand_is_not_exact_when_the_sequence_is_averaged(N):
    """Negative control: both layers lie before the pool."""
    model = dense.random_model(nn.Linear(5, 4), nn.Linear(4, 3), MeanOverSequence())
    x = dense.randn(N, 4, 8, 5)
    errors = dense.block_errors(model, x, dense.kfac_factors(model, x, weight_sharing="expand"))
    assert min(errors.values()) > dense.DIFFERENT, errors


# E4: pooling part-way.


def pooled_part_way():
    """The mean over the sequence stands between the second and the third of four layers."""
    layers = [nn.Linear(7, 3), nn.Linear(3, 3), MeanOverSequence(), nn.Linear(3, 3), nn.Linear(3, 2)]
    return dense.random_model(*layers), dense.randn(6, 5, 7)


def test_mixed_pooling_reduce_is_exact_everywhere():
    model, x = pooled_part_way()
    assert_all_exact(model, x, dense.kfac_factors(model, x, weight_sharing="reduce"))


def test_mixed_pooling_expand_is_exact_behind_the_pool_alone():
    model, x = pooled_part_way()
    errors = dense.block_errors(model, x, dense.kfac_factors(model, x, weight_sharing="expand"))
    assert max(errors["3"], errors["4"]) <= dense.EXACT, errors
    assert min(errors["0"], errors["1"]) > dense.DIFFERENT, errors


# E5: the same Linear for two inputs.


class Halves(nn.Module):
    """One Linear on both halves of the input; `second_bias`: whether the second call has the bias too."""

    def __init__(self, join: str, second_bias: bool) -> None:
        super().__init__()
        self.shared, self.join, self.second_bias = nn.Linear(3, 4), join, second_bias
        self.last = nn.Linear(8 if join == "concatenated" else 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        y = self.shared(left), self.shared(right) if self.second_bias else F.linear(right, self.shared.weight)
        if self.join == "positions":
            return self.last(torch.stack(y, dim=1))
        return self.last(torch.cat(y, dim=-1) if self.join == "concatenated" else y[0] + y[1])


def halves(join, second_bias=True):
    torch.manual_seed(0)
    return Halves(join, second_bias).double(), dense.randn(1, 6)


@pytest.mark.parametrize("second_bias", [True, False])
def test_tied_weight_at_two_positions_is_exact_with_expand(second_bias):
    """Each call reaches loss terms of its own: the two calls are two rows of one weight, counted once."""
    model, x = halves("positions", second_bias)
    factors = dense.kfac_factors(model, x, weight_sharing="expand")
    dense.assert_exact(dense.kron(factors["shared"]), dense.fisher_block(model, x, "shared.weight", "shared.bias"))
    dense.assert_exact(dense.kron(factors["last"]), dense.fisher_block(model, x, "last.weight", "last.bias"))


@pytest.mark.parametrize("second_bias", [True, False])
def test_tied_weight_concatenated_without_a_layer_behind_is_exact_with_expand(second_bias):
    """Both calls belong to one loss term, but to output directions of their own."""
    model, x = halves("concatenated", second_bias)
    model.last = nn.Identity()
    factors = dense.kfac_factors(model, x, weight_sharing="expand")
    dense.assert_exact(dense.kron(factors["shared"]), dense.fisher_block(model, x, "shared.weight", "shared.bias"))


@pytest.mark.parametrize("second_bias", [True, False])
def test_tied_weight_summed_is_exact_with_reduce(second_bias):
    model, x = halves("summed", second_bias)
    factors = dense.kfac_factors(model, x, weight_sharing="reduce")
    expected = dense.fisher_block(model, x, "shared.weight", "shared.bias")
    dense.assert_exact(dense.kron(factors["shared"]), expected)
    expand = dense.kfac_factors(model, x, weight_sharing="expand")
    assert dense.relative_error(dense.kron(expand["shared"]), expected) > dense.DIFFERENT


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("join", ["positions", "concatenated", "summed"])
def test_tied_weight_is_merged_by_definition(join, fisher):
    """A = sum over both calls / L and G = sum / (2 N), where the calls don't make an exact block either (N = 5)."""
    model, x = halves(join)[0], dense.randn(5, 6)
    left, right = x.chunk(2, dim=-1)
    y = [model.shared(left), model.shared(right)]
    if join == "positions":
        z = model.last(torch.stack(y, 1))
    else:
        z = model.last(torch.cat(y, -1) if join == "concatenated" else y[0] + y[1])
    calls = [(left, y[0], 0), (right, y[1], 0)]
    if fisher == "exact":
        expected = dense.by_definition(z, calls, 4)
        factors = dense.kfac_factors(model, x)
    else:
        loss_scale = z.numel() // 2  # a sum over the loss terms, two outputs each
        found = torch.autograd.grad(0.5 * z.square().sum(), y)
        a, g = torch.cat([torch.cat([c, c.new_ones(5, 1)], 1) for c in (left, right)]), torch.cat(found)
        expected = {"A": a.T @ a / loss_scale, "G": g.T @ g / 10}
        factors = dense.kfac_factors(
            model, x, fisher="empirical", loss=lambda z: 0.5 * z.square().sum(), loss_scale=float(loss_scale)
        )
    dense.assert_factors_equal({"shared": factors["shared"]}, {"shared": expected})


def test_empirical_refuses_a_weight_that_is_also_used_outside_its_module(caplog):
    """The taps see modules alone: with a use elsewhere the weight falls back, and the log says why."""
    model, x = halves("concatenated", second_bias=False)
    model.last = nn.Identity()
    options = {"likelihood": "gaussian", "fisher": "empirical", "factor_fraction": 1.0}
    optimizer = KFAC(model, lr=0.0, compile=False, **options)
    (0.5 * model(x).square().sum()).backward()
    with caplog.at_level("INFO", logger="kfac_triton"):
        optimizer.step()
    assert optimizer.coverage()["shared.weight"] == "fallback" and "shared" not in optimizer.factors()
    assert "shared.weight (used outside its module" in caplog.text


# E6: axes of the output.


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("likelihood", dense.LIKELIHOODS)
def test_output_axes_are_loss_terms(likelihood, dim):
    """(N, 7, 5, 3) or (N, 3, 7, 5) outputs equal 35 N rows of 3."""

    class ClassAxis(nn.Module):
        def forward(self, z):
            return z.movedim(-1, dim)

    body = net(nn.Tanh, (4, 4, 3))
    x = dense.randn(2, 7, 5, 4)
    flat = dense.kfac_factors(body, x.flatten(0, -2), likelihood=likelihood)
    model = nn.Sequential(*body, ClassAxis())
    deep = dense.kfac_factors(model, x, likelihood=dense.LIKELIHOOD_TYPES[likelihood](dim=dim))
    dense.assert_factors_equal(deep, flat)


@pytest.mark.parametrize("likelihood", dense.LIKELIHOODS)
def test_output_axes_are_loss_terms_of_the_empirical_fisher(likelihood):
    body, x, y = net(nn.Tanh, (4, 4, 3)), dense.randn(2, 7, 5, 4), torch.arange(70) % 3
    targets = y if likelihood == "categorical" else F.one_hot(y, 3).double()

    def loss(z):
        return dense.LIKELIHOOD_TYPES[likelihood]().nll(z.reshape(70, 3), targets)

    deep, flat = (
        dense.kfac_factors(body, t, likelihood=likelihood, fisher="empirical", loss=loss) for t in (x, x.flatten(0, -2))
    )
    dense.assert_factors_equal(deep, flat)


# E7: activations that overwrite a layer's output.


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("batch", [(6,), (3, 4)], ids=str)  # F.linear returns a view for inputs with positions
def test_inplace_activations_do_not_touch_the_factors(batch, fisher):
    x = dense.randn(*batch, 5)
    plain, inplace = (
        dense.kfac_factors(net(lambda i=i: nn.ReLU(inplace=i)), x, likelihood="bernoulli", fisher=fisher)
        for i in (False, True)
    )
    dense.assert_factors_equal(inplace, plain, tolerance=1e-14)


# E24: the Fisher by enumeration of all targets.


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_enumerating_every_target_gives_the_exact_factors(likelihood):
    """sum over y of p(y) grad nll(y) grad nll(y)^T, on a batch, for G of the middle layer."""
    model, x, C = net(nn.Tanh), dense.randn(6, 5), 3
    middle = model[2](model[1](model[0](x)))
    z = model[4](model[3](middle))
    G = torch.zeros(4, 4, dtype=torch.float64)
    outcomes = range(C) if likelihood == "categorical" else range(2**C)
    for outcome in outcomes:
        if likelihood == "categorical":
            log_p = torch.log_softmax(z, -1)[:, outcome]
        else:
            bits = torch.tensor([(outcome >> i) & 1 for i in range(C)], dtype=z.dtype)
            log_p = (bits * F.logsigmoid(z) + (1 - bits) * F.logsigmoid(-z)).sum(-1)
        (g,) = torch.autograd.grad(-log_p.sum(), middle, retain_graph=True)
        G += g.T @ (log_p.detach().exp()[:, None] * g) / len(x)
    dense.assert_exact(dense.kfac_factors(model, x, likelihood=likelihood)["2"]["G"], G)


# Positions that mix inside the network: an exact pass needs a backward pass for each of them.


class Mixing(nn.Module):
    """Three positions that all see each other, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)
        self.register_buffer("mix", dense.randn(3, 3, seed=9))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.mix @ self.first(x)))


@pytest.mark.parametrize("likelihood", dense.LIKELIHOODS)
def test_exact_with_positions_that_mix(likelihood):
    torch.manual_seed(0)
    model, x = Mixing().double(), dense.randn(4, 3, 4)
    s = model.first(x)
    z = model.second(torch.tanh(model.mix @ s))
    expected = dense.by_definition(z, [(x, s, 0)], 3, likelihood=likelihood)
    factors = dense.kfac_factors(model, x, likelihood=likelihood)
    dense.assert_factors_equal({"first": factors["first"]}, {"first": expected})


# K-FAC follows weights, not modules: functional code, transposes, chunks, packed projections.


class Functional(nn.Module):
    """A hidden layer `call(self, x)` made of `w` and `b`, then tanh and a fixed readout of two outputs."""

    def __init__(self, call, weight_shape=(4, 5)):
        super().__init__()
        self.w, self.b = nn.Parameter(dense.randn(*weight_shape, seed=3)), nn.Parameter(dense.randn(4, seed=4))
        self.call = call

    def forward(self, x):
        return torch.tanh(self.call(self, x)) @ dense.randn(4, 2, seed=6)


# name: (the hidden layer, whether the weight is stored (d_in, d_out), whether the bias belongs to the block)
FUNCTIONAL = {
    "F.linear": (lambda m, x: F.linear(x, m.w), False, False),
    "F.linear with bias": (lambda m, x: F.linear(x, m.w, m.b), False, True),
    "F.linear by keywords": (lambda m, x: F.linear(bias=m.b, weight=m.w, input=x), False, True),
    "F.linear of a transpose": (lambda m, x: F.linear(x, m.w.t(), m.b), True, True),
    "x @ w": (lambda m, x: x @ m.w, True, False),
    "x @ w + b": (lambda m, x: x @ m.w + m.b, True, False),
    "x @ w.T": (lambda m, x: x @ m.w.T, False, False),
    "x @ w.T + b": (lambda m, x: x @ m.w.T + m.b, False, False),
    "x @ w.mT": (lambda m, x: x @ m.w.mT, False, False),
    "x @ w.transpose": (lambda m, x: x.matmul(m.w.transpose(0, 1)), False, False),
    "torch.matmul": (lambda m, x: torch.matmul(x, m.w), True, False),
    "torch.mm": (lambda m, x: torch.mm(x.flatten(0, -2), m.w).unflatten(0, x.shape[:-1]), True, False),
    "w @ x": (lambda m, x: (m.w @ x.mT).mT, False, False),
    "w.T @ x": (lambda m, x: (m.w.T @ x.mT).mT, True, False),
    "torch.addmm": (lambda m, x: torch.addmm(m.b, x.flatten(0, -2), m.w).unflatten(0, x.shape[:-1]), True, True),
    "torch.addmm of a transpose": (
        lambda m, x: torch.addmm(m.b, x.flatten(0, -2), m.w.t()).unflatten(0, x.shape[:-1]),
        False,
        True,
    ),
}


def unit_step(model, x, **options):
    """The optimizer after one step of length 1 on the sum of squares, so that the parameters moved by -V."""
    options = {"likelihood": "gaussian", "fisher": "exact", "damping": 0.1, **options}
    optimizer = KFAC(model, lr=1.0, momentum=0.0, compile=False, factor_fraction=1.0, **options)
    model(x).square().mean().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("batch", [(6,), (3, 2)], ids=str)
@pytest.mark.parametrize("case", FUNCTIONAL)
def test_functional_weight_equals_a_linear_module(case, batch):
    """The factors of the nn.Linear that holds the same numbers, and the same step of the weight."""
    call, stored_in_out, bias = FUNCTIONAL[case]
    model, x = Functional(call, (5, 4) if stored_in_out else (4, 5)), dense.randn(*batch, 5)
    added = "+ b" in case  # a bias that some other function adds has a block of its own
    twin = Functional(lambda m, x: m.layer(x) + m.b * added)
    twin.layer = nn.Linear(5, 4, bias=bias).double()
    with torch.no_grad():
        twin.layer.weight.copy_(model.w.T if stored_in_out else model.w)
        if bias:
            twin.layer.bias.copy_(model.b)
    assert torch.allclose(model(x), twin(x), atol=1e-14)
    optimizer, twins = (unit_step(m, x, kl_clip=None) for m in (model, twin))
    apart = "position" if added else "fallback"
    assert optimizer.coverage() == {"w": "linear", "b": "linear" if bias else apart}
    dense.assert_factors_equal({"w": optimizer.factors()["w"]}, {"w": twins.factors()["layer"]})
    dense.assert_exact((model.w.T if stored_in_out else model.w).detach(), twin.layer.weight.detach())
    if bias:
        dense.assert_exact(model.b.detach(), twin.layer.bias.detach())


@pytest.mark.parametrize("call", [lambda m, v: m.w @ v, lambda m, v: torch.mv(m.w, v)], ids=["w @ v", "torch.mv"])
def test_functional_weight_times_a_vector(call):
    """An input without any batch axis."""

    class OneRow(Functional):
        def forward(self, x):
            return super().forward(x)[None]

    model, x = OneRow(call), dense.randn(5)
    s = F.linear(x, model.w)
    expected = dense.by_definition((torch.tanh(s) @ dense.randn(4, 2, seed=6))[None], [(x, s, 0)], 4, bias=False)
    dense.assert_factors_equal(dense.kfac_factors(model, x), {"w": expected})


class Conv1D(nn.Module):
    """The linear layer of GPT-2: the weight is stored (d_in, d_out)."""

    def __init__(self, d_out, d_in):
        super().__init__()
        self.nf = d_out
        self.weight, self.bias = nn.Parameter(torch.randn(d_in, d_out)), nn.Parameter(torch.randn(d_out))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_gpt2_conv1d_equals_linear(weight_sharing):
    """Factors and a step of two layers with positions; tanh is applied to a view of addmm's result."""
    model = nn.Sequential(Conv1D(4, 5), nn.Tanh(), Conv1D(2, 4)).double()
    twin = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for ours, theirs in zip(model[::2], twin[::2], strict=True):
            theirs.weight.copy_(ours.weight.T)
            theirs.bias.copy_(ours.bias)
    x = dense.randn(3, 2, 5)
    optimizer, twins = (unit_step(m, x, weight_sharing=weight_sharing) for m in (model, twin))
    dense.assert_factors_equal(optimizer.factors(), twins.factors())
    for ours, theirs in zip(model[::2], twin[::2], strict=True):
        dense.assert_exact(ours.weight.T.detach(), theirs.weight.detach())
        dense.assert_exact(ours.bias.detach(), theirs.bias.detach())


# Packed weights: the rows of one parameter in several calls, and attention.


class Packed(nn.Module):
    """Query, key and value projections in one parameter, cut apart by `cut`."""

    def __init__(self, cut, sizes):
        super().__init__()
        d_out = sum(sizes)
        self.weight, self.bias = nn.Parameter(dense.randn(d_out, 4)), nn.Parameter(dense.randn(d_out, seed=2))
        self.cut, self.sizes = cut, sizes

    def outputs(self, x):
        pieces = zip(self.cut(self.weight), self.cut(self.bias), strict=True)
        return [F.linear(x, w, b) for w, b in pieces]

    def forward(self, x):
        return torch.tanh(torch.cat(self.outputs(x), -1)) @ dense.randn(sum(self.sizes), 2, seed=6)


CUTS = {
    "chunk": (lambda t: t.chunk(3), (3, 3, 3)),
    "split": (lambda t: t.split([2, 1, 3]), (2, 1, 3)),
    "slices": (lambda t: (t[:2], t[2:3], t[3:]), (2, 1, 3)),
    "unbind": (lambda t: t.unflatten(0, (3, 2)).unbind(0), (2, 2, 2)),
}


@pytest.mark.parametrize("case", CUTS)
def test_chunks_of_a_packed_weight(case):
    """By definition three calls of one weight; so each chunk's block equals that of a Linear of its own."""
    cut, sizes = CUTS[case]
    model, x = Packed(cut, sizes), dense.randn(5, 4)
    outputs = model.outputs(x)
    z = torch.tanh(torch.cat(outputs, -1)) @ dense.randn(sum(sizes), 2, seed=6)
    starts = [0, *itertools.accumulate(sizes)]
    calls = [(x, s, start) for s, start in zip(outputs, starts, strict=False)]
    factors = dense.kfac_factors(nn.Sequential(model), x)["0"]
    dense.assert_factors_equal({"0": factors}, {"0": dense.by_definition(z, calls, sum(sizes))})
    for call, size in zip(calls, sizes, strict=True):
        rows = slice(call[2], call[2] + size)
        own = dense.by_definition(z, [(call[0], call[1], 0)], size)
        dense.assert_exact(torch.kron(factors["G"][rows, rows], factors["A"]), dense.kron(own))


E, HEADS = 4, 2


# By which inputs are one tensor, torch uses the packed weight once, twice or three times, for these of its rows.
PACKED_CALLS = {
    "self": lambda x, memory: [(x, 0, 3 * E)],
    "cross": lambda x, memory: [(x, 0, E), (memory, E, 3 * E)],
    "three inputs": lambda x, memory: [(x, 0, E), (memory, E, 2 * E), (memory.flip(1), 2 * E, 3 * E)],
}


def attention_by_hand(mha, weights, inputs):
    """nn.MultiheadAttention on (N, T, E) inputs from its parameters: (s of each call, context, outputs).

    `weights`: one (weight, bias or None) for each of `inputs`; their outputs side by side are q, k and v.
    """
    s = [x @ w.T + (0 if b is None else b) for x, (w, b) in zip(inputs, weights, strict=True)]
    pieces = [piece for outputs in s for piece in outputs.split(E, -1)]
    q, k, v = (piece.unflatten(-1, (HEADS, -1)).transpose(1, 2) for piece in pieces)
    attention = torch.softmax(q @ k.mT / (E // HEADS) ** 0.5, -1)
    context = (attention @ v).transpose(1, 2).flatten(2)
    return s, context, F.linear(context, mha.out_proj.weight, mha.out_proj.bias)


class Attend(nn.Module):
    """Attention on examples-first inputs, whatever order the module wants, and a fixed readout of two outputs."""

    def __init__(self, kind, batch_first, **options):
        super().__init__()
        self.mha = nn.MultiheadAttention(E, HEADS, batch_first=batch_first, **options).double()
        self.kind = kind
        self.need_weights = batch_first  # so that both of torch's ways to compute attention run
        with torch.no_grad():
            for i, p in enumerate(self.mha.parameters()):
                p.copy_(dense.randn(*p.shape, seed=i))

    def forward(self, x, memory):
        transposed = [t if self.mha.batch_first else t.transpose(0, 1) for t in (x, memory)]
        query, key = transposed[0], transposed[0] if self.kind == "self" else transposed[1]
        value = key.flip(int(self.mha.batch_first)) if self.kind == "three inputs" else key
        out = self.mha(query, key, value, need_weights=self.need_weights)[0]
        return readout(out if self.mha.batch_first else out.transpose(0, 1))


def readout(out):
    return torch.tanh(out) @ dense.randn(out.shape[-1], 2, seed=6)


# Two examples of 3 and 2 positions: rows of query and memory, examples and positions must not be confused.
QUERY, MEMORY = dense.randn(2, 3, E), dense.randn(2, 2, E, seed=2)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", PACKED_CALLS)
def test_packed_attention(kind, batch_first, bias, weight_sharing):
    model = Attend(kind, batch_first, bias=bias)
    W, b = model.mha.in_proj_weight, model.mha.in_proj_bias
    packed = PACKED_CALLS[kind](QUERY, MEMORY)
    weights = [(W[start:stop], None if b is None else b[start:stop]) for _, start, stop in packed]
    s, context, out = attention_by_hand(model.mha, weights, [x for x, _, _ in packed])
    z, options = readout(out), {"bias": bias, "examples": 2 if weight_sharing == "reduce" else None}
    assert torch.allclose(z, model(QUERY, MEMORY), atol=1e-13)
    calls = [(x, outputs, start) for (x, start, _), outputs in zip(packed, s, strict=True)]
    expected = {
        "mha.in_proj_weight": dense.by_definition(z, calls, 3 * E, **options),
        "mha.out_proj": dense.by_definition(z, [(context, out, 0)], E, **options),
    }
    factors = dense.kfac_factors(model, (QUERY, MEMORY), weight_sharing=weight_sharing)
    dense.assert_factors_equal(factors, expected)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_with_separate_projections(batch_first, bias, weight_sharing):
    """kdim, vdim: three weights. Their biases stay packed, so no block of one weight holds them: they fall back."""
    model = Attend("three inputs", batch_first, bias=bias, kdim=5, vdim=5)
    memory = dense.randn(2, 2, 5, seed=2)
    inputs = [QUERY, memory, memory.flip(1)]
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    biases = model.mha.in_proj_bias.chunk(3) if bias else (None,) * 3
    weights = [(getattr(model.mha, name), b) for name, b in zip(names, biases, strict=True)]
    s, context, out = attention_by_hand(model.mha, weights, inputs)
    z, examples = readout(out), 2 if weight_sharing == "reduce" else None
    assert torch.allclose(z, model(QUERY, memory), atol=1e-13)
    expected = {
        f"mha.{name}": dense.by_definition(z, [(x, outputs, 0)], E, bias=False, examples=examples)
        for name, x, outputs in zip(names, inputs, s, strict=True)
    }
    expected["mha.out_proj"] = dense.by_definition(z, [(context, out, 0)], E, bias=bias, examples=examples)
    factors = dense.kfac_factors(model, (QUERY, memory), weight_sharing=weight_sharing)
    dense.assert_factors_equal(factors, expected)


class Encoder(nn.Module):
    def __init__(self, batch_first, norm_first):
        super().__init__()
        options = {"dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first, "dtype": torch.float64}
        self.layer = nn.TransformerEncoderLayer(E, HEADS, 6, **options)
        with torch.no_grad():
            for i, p in enumerate(self.layer.parameters()):
                p.add_(0.3 * dense.randn(*p.shape, seed=i))

    def forward(self, x):
        if self.layer.self_attn.batch_first:
            return readout(self.layer(x))
        return readout(self.layer(x.transpose(0, 1)).transpose(0, 1))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(
    ("batch_first", "weight_sharing"), [(True, "expand"), (True, "reduce"), (False, "expand")]
)  # reduce finds the examples of a plain linear layer on the first axis alone
def test_transformer_encoder_layer(batch_first, norm_first, weight_sharing):
    torch.manual_seed(0)
    model = Encoder(batch_first, norm_first)
    layer = model.layer
    packed = [(layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias)]
    first = layer.norm1(QUERY) if norm_first else QUERY
    (s,), context, attended = attention_by_hand(layer.self_attn, packed, [first])
    x = QUERY + attended if norm_first else layer.norm1(QUERY + attended)
    second = layer.norm2(x) if norm_first else x
    hidden = layer.linear1(second)
    activated = torch.relu(hidden)
    final = layer.linear2(activated)
    z = readout(x + final if norm_first else layer.norm2(x + final))
    assert torch.allclose(z, model(QUERY), atol=1e-13)
    calls = {
        "self_attn.in_proj_weight": (first, s, 3 * E),
        "self_attn.out_proj": (context, attended, E),
        "linear1": (second, hidden, 6),
        "linear2": (activated, final, E),
    }
    examples = 2 if weight_sharing == "reduce" else None
    expected = {
        f"layer.{name}": dense.by_definition(z, [(a, outputs, 0)], d_out, examples=examples)
        for name, (a, outputs, d_out) in calls.items()
    }
    factors = dense.kfac_factors(model, QUERY, weight_sharing=weight_sharing)
    dense.assert_factors_equal({name: factors[name] for name in expected}, expected)


def test_reduce_refuses_a_layer_whose_first_axis_cannot_be_the_examples():
    """Three positions before two examples: 6 rows divide by 2, but not into examples."""
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="examples on the first axis"):
        dense.kfac_factors(Encoder(batch_first=False, norm_first=True), QUERY, weight_sharing="reduce")


def test_a_bias_of_two_weights_belongs_to_neither_block():
    class SharedBias(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(dense.randn(3, 3)), nn.Parameter(dense.randn(3, 3, seed=2))
            self.b = nn.Parameter(dense.randn(3, seed=4))

        def forward(self, x):
            return F.linear(torch.tanh(F.linear(x, self.first, self.b)), self.second, self.b)

    model, x = SharedBias(), dense.randn(1, 3)
    factors = dense.kfac_factors(model, x)
    assert factors.keys() == {"first", "second"}
    for name in factors:
        dense.assert_exact(dense.kron(factors[name]), dense.fisher_block(model, x, name))


def test_a_weight_used_both_ways_round_falls_back():
    """Rows of the weight are outputs in one use and inputs in the other: no one block holds both."""
    model = Functional(lambda m, x: torch.tanh(x @ m.w) @ m.w.T, (4, 4))
    optimizer = unit_step(model, dense.randn(6, 4))
    assert optimizer.coverage() == {"w": "fallback", "b": "fallback"}
    assert optimizer.factors() == {}


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
def test_a_use_for_the_whole_batch_sees_every_example_on_its_own(likelihood):
    """A table that is looked up once for all N examples: without random signs, sum over n of g_n, squared, is N times
    the sum of the squares."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.table(torch.arange(4)))

    model, N, updates = Shared(), 16, 12
    x = 0.1 * torch.randn(N, 4, 3, generator=torch.Generator().manual_seed(0))
    optimizer = KFAC(
        model, likelihood=likelihood, fisher="exact", factor_fraction=1.0, factor_decay=0.999, lr=0.0, compile=False
    )
    for _ in range(updates):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    W = model.head.weight.detach()
    z = model(x).detach().flatten(0, 1)
    p = z.softmax(-1)
    H = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2) if likelihood == "categorical" else torch.eye(2)
    expected = torch.einsum("...ij,ik,jl->...kl", H, W, W).expand(len(z), 3, 3).sum(0) / len(z)
    factors = optimizer.factors()["table"]
    found = torch.kron(factors["G"], torch.diag(factors["A"]) if factors["A"].dim() == 1 else factors["A"]).trace()
    assert 0.5 < float(found) / float(expected.trace()) < 2
