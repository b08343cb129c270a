"""Oracles in dense float64 algebra. They share no code with the package but its constructor.

`fisher_block` is the ground truth, sum over loss terms of J^T H J / L by torch.func.jacrev. `by_definition` follows the
words of the contract ("Scale"): A = sum a a^T / L, G = sum g g^T / rows, with one backward pass for every output of
every loss term, so that it needs no assumption on which positions mix. `patches` is im2col by loops.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from kfac_triton import KFAC, Bernoulli, Categorical, Gaussian

LIKELIHOODS = ("categorical", "bernoulli", "gaussian")
LIKELIHOOD_TYPES = {"categorical": Categorical, "bernoulli": Bernoulli, "gaussian": Gaussian}

EXACT = 1e-10  # float64, relative to the largest entry: wherever theory says "equal"
DIFFERENT = 1e-3  # a negative control must miss by this much at least, seven orders above


ZERO = 1e-20  # second moments below this are the rounding errors of a zero


def relative_error(value: Tensor, expected: Tensor) -> float:
    """max |value - expected| / max |expected|; infinite where a shape differs or something is not finite."""
    value, expected = value.detach(), expected.detach()
    if value.shape != expected.shape or not torch.isfinite(value).all():
        return float("inf")
    return float((value - expected).abs().max() / expected.abs().max().clamp(min=ZERO))


def assert_exact(value: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    assert value.dtype == expected.dtype
    assert relative_error(value, expected) <= tolerance


def assert_factors_equal(
    value: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]], tolerance: float = EXACT
) -> None:
    """Both A and G of every layer, by name."""
    assert value.keys() == expected.keys() != set()
    for name in expected:
        for factor in "AG":
            error = relative_error(value[name][factor], expected[name][factor])
            assert error <= tolerance, f"{name}.{factor} differs by {error:.1e}"


def random_model(*modules: nn.Module, seed: int = 0) -> nn.Sequential:
    """The modules in float64, training mode, with reproducible weights and biases that are not small."""
    model = nn.Sequential(*modules).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            fan_in = p[0].numel() if p.dim() > 1 else 1
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / fan_in**0.5)
    return model


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_of(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def kfac_factors(
    model: nn.Module,
    *batches: Any,
    likelihood: Any = "gaussian",
    fisher: str = "exact",
    loss: Callable[[Tensor], Tensor] = torch.sum,
    **options: Any,
) -> dict[str, dict[str, Tensor]]:
    """`optimizer.factors()` after one step for each of `batches` (an input, or a tuple of several), with lr = 0."""
    options = {"lr": 0.0, "compile": False, "factor_fraction": 1.0, **options}
    model.train()
    with KFAC(model, likelihood=likelihood, fisher=fisher, **options) as optimizer:
        for x in batches:
            optimizer.zero_grad()
            loss(model(*inputs_of(x))).backward()
            optimizer.step()
        return {name: {k: F.clone() for k, F in pair.items()} for name, pair in optimizer.factors().items()}


def kron(factors: dict[str, Tensor]) -> Tensor:
    """The block that the contract promises to be the layer's Fisher."""
    return torch.kron(factors["G"], factors["A"])


def terms_last(z: Tensor, dim: int = -1) -> Tensor:
    """Outputs as (L, C): a row for every loss term."""
    return z.movedim(dim, -1).flatten(0, -2) if z.dim() > 1 else z[None]


def output_fisher(likelihood: str, z: Tensor) -> Tensor:
    """H of every loss term, (L, C, C), for outputs z (L, C): I, diag(p) - p p^T, or diag(p (1 - p))."""
    if likelihood == "gaussian":
        return torch.eye(z.shape[-1], dtype=z.dtype).expand(len(z), -1, -1)
    if likelihood == "categorical":
        p = torch.softmax(z, -1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert likelihood == "bernoulli"
    p = 1 / (1 + torch.exp(-z))
    return torch.diag_embed(p * (1 - p))


def fisher_block(
    model: nn.Module, x: Any, weight: str, bias: str | None = None, *, likelihood: str = "gaussian", dim: int = -1
) -> Tensor:
    """Fisher of the mean nll over loss terms, for cat([weight.flatten(1), bias[:, None]], 1).flatten()."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(chosen: dict[str, Tensor]) -> Tensor:
        return terms_last(functional_call(model, {**parameters, **chosen}, inputs_of(x)), dim)

    chosen = {name: parameters[name] for name in (weight, bias) if name is not None}
    jacobians = jacrev(outputs)(chosen)
    J = jacobians[weight]
    J = J.flatten(3) if J.dim() > 3 else J  # (L, C, d_out, d_in), or of a vector (L, C, d)
    if bias is not None:
        J = torch.cat([J, jacobians[bias].unsqueeze(-1)], dim=-1)
    J = J.flatten(2)
    H = output_fisher(likelihood, outputs(chosen))
    return torch.einsum("lcp,lcd,ldq->pq", J, H, J) / len(H)


def gram(model: nn.Module, x: Tensor, vs: list[dict], likelihood: str, seed: int = 0) -> Tensor:
    """v_i^T F v_j (k, k) for the Fisher of the mean nll over all parameters, by a dense Jacobian; 0 for those left out.

    `seed` is that of dropout. Batch statistics are those of `x`, and running ones stay.
    """
    names = {p: name for name, p in model.named_parameters()}
    values = {name: p.detach() for p, name in names.items()}

    def outputs(values):
        torch.manual_seed(seed)
        return terms_last(functional_call(model, values, (x,)))

    noting = [m for m in model.modules() if m.training and getattr(m, "track_running_stats", False)]
    for m in noting:
        m.track_running_stats = False
    with torch.random.fork_rng():
        z, jacobians = outputs(values), jacrev(outputs)(values)
    for m in noting:
        m.track_running_stats = True
    J = torch.cat([jacobians[name].flatten(2) for name in values], dim=2)
    flat = torch.stack([torch.cat([v[p].flatten() if p in v else torch.zeros(p.numel()) for p in names]) for v in vs])
    Jv = torch.einsum("lcp,kp->klc", J, flat.double())
    return torch.einsum("ilc,lcd,jld->ij", Jv, output_fisher(likelihood, z), Jv) / len(z)


def linear_and_conv_layers(model: nn.Module) -> dict[str, tuple[str, str | None]]:
    """{name of the layer: (name of its weight, name of its bias)}."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            layers[name] = (f"{name}.weight", None if module.bias is None else f"{name}.bias")
    return layers


def block_errors(
    model: nn.Module, x: Any, factors: dict[str, dict[str, Tensor]], *, likelihood: str = "gaussian", dim: int = -1
) -> dict[str, float]:
    """Relative error of every layer's kron(G, A) against the dense block."""
    layers = linear_and_conv_layers(model)
    assert layers.keys() == factors.keys()
    return {
        name: relative_error(kron(factors[name]), fisher_block(model, x, *pair, likelihood=likelihood, dim=dim))
        for name, pair in layers.items()
    }


# One call of a layer: its inputs (..., d_in), its outputs (..., d_out) in the graph, and the rows of the weight that it
# used (the index of the first).
Call = tuple[Tensor, Tensor, int]


def by_definition(
    z: Tensor,
    calls: Sequence[Call],
    d_out: int,
    *,
    bias: Sequence[bool] | bool = True,
    likelihood: str = "gaussian",
    dim: int = -1,
    examples: int | None = None,
) -> dict[str, Tensor]:
    """A and G of one weight from what its calls saw. `bias` by call; all False: no homogeneous coordinate.

    With `examples` the weight is shared in the way of "reduce"; positions of one example stand together.
    """
    flags = [bias] * len(calls) if isinstance(bias, bool) else list(bias)
    rows = [a.detach().reshape(-1, a.shape[-1]) for a, _, _ in calls]
    if any(flags):
        rows = [torch.cat([r, r.new_full((len(r), 1), float(flag))], 1) for r, flag in zip(rows, flags, strict=True)]
    gradients = [_padded_gradients(calls, found, d_out) for found in output_directions(z, calls, likelihood, dim)]
    L = terms_last(z, dim).shape[0]
    if examples is None:
        a = torch.cat(rows)
        g = torch.cat([torch.cat(per_call) for per_call in gradients])
        return {"A": a.T @ a / L, "G": g.T @ g / len(a)}
    positions = sum(len(r) for r in rows) // examples
    a = sum(r.unflatten(0, (examples, -1)).sum(1) for r in rows)
    g = torch.cat([sum(r.unflatten(0, (examples, -1)).sum(1) for r in p) / positions for p in gradients])
    return {"A": a.T @ a / L, "G": g.T @ g / examples}


def output_directions(z: Tensor, calls: Sequence[Call], likelihood: str, dim: int) -> Iterable[list[Tensor]]:
    """The gradients of every call's outputs, one loss term and one column of H's root at a time."""
    terms = terms_last(z, dim)
    values, vectors = torch.linalg.eigh(output_fisher(likelihood, terms.detach()))
    roots = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    for l, c in itertools.product(range(terms.shape[0]), range(terms.shape[1])):
        found = torch.autograd.grad(
            terms[l], [s for _, s, _ in calls], roots[l, :, c], retain_graph=True, allow_unused=True
        )
        yield [torch.zeros_like(s) if f is None else f for f, (_, s, _) in zip(found, calls, strict=True)]


def _padded_gradients(calls: Sequence[Call], found: list[Tensor], d_out: int) -> list[Tensor]:
    padded = []
    for (_, s, start), f in zip(calls, found, strict=True):
        g = torch.zeros(s.numel() // s.shape[-1], d_out, dtype=f.dtype)
        g[:, start : start + s.shape[-1]] = f.reshape(-1, s.shape[-1])
        padded.append(g)
    return padded


def patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    padding_mode: str = "zeros",
) -> Tensor:
    """Patches (N, positions, C * prod(kernel)) of x (N, C, *spatial), entry by entry."""
    spatial = x.shape[2:]
    axes = range(len(spatial))
    total = [dilation[i] * (kernel[i] - 1) for i in axes]
    if padding == "same":
        before, after = [t // 2 for t in total], [t - t // 2 for t in total]
    else:
        before = after = [0] * len(spatial) if padding == "valid" else list(padding)
    counts = [(spatial[i] + before[i] + after[i] - total[i] - 1) // stride[i] + 1 for i in axes]
    values = x.numpy()
    out = np.zeros((x.shape[0], int(np.prod(counts)), x.shape[1] * int(np.prod(kernel))))
    for row, position in enumerate(itertools.product(*map(range, counts))):
        for column, (channel, *offset) in enumerate(itertools.product(range(x.shape[1]), *map(range, kernel))):
            index = [_source(position[i] * stride[i] + offset[i] * dilation[i] - before[i], spatial[i], padding_mode)
                     for i in axes]  # fmt: skip
            if None not in index:
                out[:, row, column] = values[(slice(None), channel, *index)]
    return torch.from_numpy(out)


def _source(i: int, size: int, padding_mode: str) -> int | None:
    """Where the padded image takes entry i from; None: a zero."""
    if 0 <= i < size:
        return i
    if padding_mode == "circular":
        return i % size
    if padding_mode == "reflect":
        return -i if i < 0 else 2 * (size - 1) - i
    return None


def damped_inverses(A: Tensor, G: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Factored Tikhonov damping by hand: (A + pi gamma I)^-1 and (G + gamma / pi I)^-1."""
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))) ** 0.5
    gamma = damping**0.5
    eye_A, eye_G = (torch.eye(len(F), dtype=F.dtype) for F in (A, G))
    return torch.linalg.inv(A + pi * gamma * eye_A), torch.linalg.inv(G + gamma / pi * eye_G)
