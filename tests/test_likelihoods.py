"""Likelihoods against torch's losses, autograd's Hessian and the moments of their own samples."""

from __future__ import annotations

import math

import dense
import pytest
import torch
import torch.nn.functional as F
from torch.func import hessian

from kfac_triton import Bernoulli, Categorical, Gaussian, Likelihood
from kfac_triton.likelihoods import as_likelihood

TYPES = dense.LIKELIHOOD_TYPES
# A row, a batch of rows, positions; one output (no Categorical: a single class is certain) and several.
SHAPES = [(4, 3), (1, 2), (2, 5, 3), (2, 2, 3, 4)]


def outputs(*shape):
    """Logits or means: moderate, and of either sign."""
    return dense.randn(*shape, seed=3)


def torch_loss(name, z, targets):
    """The summed loss as torch computes it, for outputs (L, C)."""
    if name == "categorical":
        return F.cross_entropy(z, targets, reduction="sum")
    if name == "bernoulli":
        return F.binary_cross_entropy_with_logits(z, targets, reduction="sum")
    return 0.5 * F.mse_loss(z, targets, reduction="sum")


def targets_for(name, terms):
    if name == "categorical":
        return torch.arange(len(terms)) % terms.shape[-1]
    return (dense.randn(*terms.shape) > 0).double() if name == "bernoulli" else dense.randn(*terms.shape)


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TYPES)
def test_nll_is_the_mean_over_loss_terms(name, shape, dim):
    z = outputs(*shape)
    terms = z.flatten(0, -2)
    flat = targets_for(name, terms)
    targets = flat.reshape(shape[:-1]) if name == "categorical" else flat.reshape(shape).movedim(-1, dim)
    expected = torch_loss(name, terms, flat) / len(terms)
    torch.testing.assert_close(TYPES[name](dim=dim).nll(z.movedim(-1, dim), targets), expected)


@pytest.mark.parametrize("dim", [-1, 1])
def test_categorical_takes_probabilities(dim):
    z = outputs(2, 5, 3)
    p = torch.softmax(dense.randn(2, 5, 3), -1)
    expected = -(p * torch.log_softmax(z, -1)).sum(-1).mean()
    torch.testing.assert_close(Categorical(dim=dim).nll(z.movedim(-1, dim), p.movedim(-1, dim)), expected)


@pytest.mark.parametrize("name", ["bernoulli", "gaussian"])
def test_outputs_with_one_axis_are_terms_with_one_output(name):
    """A network that squeezes its last axis: (N,) is N terms."""
    z, likelihood = outputs(5), TYPES[name]()
    targets = targets_for(name, z)
    torch.testing.assert_close(likelihood.nll(z, targets), likelihood.nll(z[:, None], targets[:, None]))
    terms = likelihood.terms_last(z)
    assert terms.shape == (5, 1)
    assert torch.equal(likelihood.terms_back(terms, z), z)


def test_categorical_outputs_with_one_axis_are_one_term():
    z, likelihood = outputs(3), Categorical()
    torch.testing.assert_close(likelihood.nll(z, torch.tensor([1])), F.cross_entropy(z[None], torch.tensor([1])))
    assert likelihood.terms_last(z).shape == (3,)


@pytest.mark.parametrize("dim", [-1, 0, 1, 2])
@pytest.mark.parametrize("name", TYPES)
def test_terms_back_undoes_terms_last(name, dim):
    z, likelihood = outputs(2, 4, 3), TYPES[name](dim=dim)
    terms = likelihood.terms_last(z)
    assert terms.shape[-1] == z.shape[dim]
    assert torch.equal(likelihood.terms_back(terms, z), z)


@pytest.mark.parametrize("shape", [*SHAPES, (3,)], ids=str)  # (3,): a single term
@pytest.mark.parametrize("name", TYPES)
def test_fisher_columns_are_a_root_of_the_output_fisher(name, shape):
    """sum over c of b_c b_c^T = H, which is the Hessian of the nll (these likelihoods are exponential families)."""
    z = outputs(*shape)
    columns = torch.stack([TYPES[name]().fisher_column(z, c) for c in range(shape[-1])])
    flat = columns.reshape(shape[-1], -1, shape[-1])
    H = torch.einsum("cli,clj->lij", flat, flat)
    terms = z.reshape(-1, shape[-1])
    dense.assert_exact(H, dense.output_fisher(name, terms))
    first = targets_for(name, terms)[:1]
    dense.assert_exact(H[0], hessian(lambda t: torch_loss(name, t[None], first))(terms[0]))


@pytest.mark.parametrize("shape", [*SHAPES, (3,)], ids=str)
@pytest.mark.parametrize("name", TYPES)
def test_products_with_the_root_of_the_output_fisher(name, shape):
    """|B^T v|^2 = v^T H v, B^T v in the base class's columns and in closed form, for one v and for several at once."""
    z, likelihood = outputs(*shape), TYPES[name]()
    several = dense.randn(2, *shape, seed=8)
    found = likelihood.fisher_root_product(z, several)
    H = dense.output_fisher(name, z.reshape(-1, shape[-1])).reshape(*shape, shape[-1])
    dense.assert_exact(found.square().sum(-1), torch.einsum("k...i,...ij,k...j->k...", several, H, several))
    for v, product in zip(several, found, strict=True):
        dense.assert_exact(likelihood.fisher_root_product(z, v), product)
        dense.assert_exact(Likelihood.fisher_root_product(likelihood, z, v), product)


# E25.


def drawn_targets(name, z, g):
    """Which targets the gradients g = mean - target belong to."""
    means = {"categorical": lambda: torch.softmax(z, -1), "bernoulli": lambda: torch.sigmoid(z), "gaussian": lambda: z}
    return means[name]() - g


@pytest.mark.parametrize("shape", [*SHAPES, (3,)], ids=str)
@pytest.mark.parametrize("name", TYPES)
def test_sampled_gradient_is_autograd_at_the_drawn_target(name, shape):
    """And the drawn target is a possible one: a class, bits."""
    z = outputs(*shape).requires_grad_()
    g = TYPES[name]().sampled_gradient(z.detach(), torch.Generator().manual_seed(0))
    assert g.shape == z.shape
    drawn = drawn_targets(name, z.detach(), g)
    if name != "gaussian":
        assert torch.allclose(drawn, drawn.round(), atol=1e-12)
        drawn = drawn.round()
        assert ((drawn == 0) | (drawn == 1)).all()
    if name == "categorical":
        assert (drawn.sum(-1) == 1).all()
        drawn = drawn.argmax(-1).flatten()
    terms = z.reshape(-1, shape[-1])
    target = drawn if name == "categorical" else drawn.reshape(terms.shape)
    (expected,) = torch.autograd.grad(torch_loss(name, terms, target), z)
    dense.assert_exact(g, expected)


N_SAMPLES = 100_000
SIGMAS = 5  # standard errors of a mean over N_SAMPLES, from the spread of the samples themselves


@pytest.mark.parametrize("scale", [1.0, 3.0])  # 3: probabilities down to about 0.01
@pytest.mark.parametrize("name", TYPES)
def test_moments_of_the_sampled_gradients(name, scale):
    """Mean 0, second moment H, at two positions with outputs of their own: within five standard errors, by entry."""
    z = scale * torch.tensor([[0.5, -1.0, 0.2, 0.9], [-0.7, 0.8, 0.0, -0.4]], dtype=torch.float64)
    g = TYPES[name]().sampled_gradient(z.expand(N_SAMPLES, 2, 4), torch.Generator().manual_seed(1))
    H = dense.output_fisher(name, z)
    for samples, expected in ((g, torch.zeros_like(z)), (g.unsqueeze(-1) * g.unsqueeze(-2), H)):
        error = (samples.mean(0) - expected).abs()
        assert (error <= SIGMAS * samples.std(0) / math.sqrt(N_SAMPLES)).all()


@pytest.mark.parametrize("name", TYPES)
def test_terms_are_sampled_independently(name):
    """The correlation of neighbouring terms (examples and positions) stays within five standard errors of 0."""
    z = torch.zeros(500, 200, 2, dtype=torch.float64)
    g = TYPES[name]().sampled_gradient(z, torch.Generator().manual_seed(1))
    for products in (g[1:] * g[:-1], g[:, 1:] * g[:, :-1]):
        assert (products.mean((0, 1)).abs() <= SIGMAS * products.std((0, 1)) / (499 * 199) ** 0.5).all()


@pytest.mark.parametrize("name", TYPES)
def test_the_generator_alone_decides_the_samples(name):
    z = outputs(50, 3)
    samples = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturbance)
        samples.append(TYPES[name]().sampled_gradient(z, torch.Generator().manual_seed(seed)))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


@pytest.mark.parametrize("name", ["categorical", "bernoulli"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_outputs_have_finite_gradients(name, dtype):
    """Logits at which probabilities round to 0 and 1."""
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], dtype=dtype)
    likelihood = TYPES[name]()
    columns = [likelihood.fisher_column(z, c) for c in range(3)]
    for t in (*columns, likelihood.sampled_gradient(z, torch.Generator().manual_seed(0))):
        assert t.dtype == dtype
        assert torch.isfinite(t).all()


@pytest.mark.parametrize("name", TYPES)
def test_names_and_objects(name):
    assert type(as_likelihood(name)) is TYPES[name]
    own = TYPES[name](dim=1)
    assert as_likelihood(own) is own
    assert repr(own) == f"{TYPES[name].__name__}(dim=1)"


@pytest.mark.parametrize("value", ["poisson", None, Gaussian])
def test_an_unknown_likelihood_is_refused_with_the_allowed_names(value):
    with pytest.raises(ValueError, match=r'likelihood must be "categorical", "bernoulli", "gaussian".*got'):
        as_likelihood(value)


@pytest.mark.parametrize("dim", ["1", 1.0, True, None])
def test_a_dim_that_is_no_integer_is_refused(dim):
    with pytest.raises(ValueError, match="dim must be an int"):
        Bernoulli(dim=dim)


def test_a_likelihood_of_ones_own():
    """The interface is enough for an exact pass: squared error scaled to a Fisher of 4 I."""

    class Twice(Likelihood):
        def nll(self, outputs, targets):
            return (outputs - targets).square().sum(-1).mean() * 2

        def sampled_gradient(self, z, generator):
            return 2 * torch.randn(z.shape, dtype=z.dtype, generator=generator)

        def fisher_column(self, z, c):
            column = torch.zeros_like(z)
            column[..., c] = 2.0
            return column

    model, x = dense.random_model(torch.nn.Linear(3, 2)), dense.randn(5, 3)
    factors = dense.kfac_factors(model, x, likelihood=Twice())["0"]
    dense.assert_exact(factors["G"], 4 * torch.eye(2, dtype=torch.float64))
