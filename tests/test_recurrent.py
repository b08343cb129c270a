"""Recurrent layers: the unrolled twin against torch's own, factors against cells written by hand, chains of times
against dense sums over a stationary process (E15)."""

from __future__ import annotations

import itertools
import statistics
import time

import dense
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

from kfac_triton import KFAC
from kfac_triton.capture import Recorded, Unrolled
from kfac_triton.fisher.sampled import SeenUse
from kfac_triton.layer import Layer
from kfac_triton.linalg.temporal_chain import product, transform
from kfac_triton.operations.layout import Layout
from kfac_triton.operations.recurrent import RecurrentUse
from kfac_triton.operations.use import Part
from kfac_triton.sample import Sample
from kfac_triton.structures.temporal import moments_of_neighbours

F64 = torch.float64
LENGTHS = torch.tensor([6, 4, 4, 1])
LAYERS = {
    "lstm": (nn.LSTM, {}),
    "lstm, projected": (nn.LSTM, {"proj_size": 2}),
    "gru": (nn.GRU, {}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}


def answers(layer: nn.Module, x: Tensor, packed: bool, seed: int = 1) -> list[Tensor]:
    """Everything that a layer returns, and the gradients of a random sum of it."""
    given = pack_padded_sequence(x, LENGTHS, batch_first=layer.batch_first) if packed else x
    found = [t for t in tree_leaves(layer(given)) if isinstance(t, Tensor) and t.is_floating_point()]
    torch.manual_seed(seed)
    total = sum((t * torch.randn_like(t)).sum() for t in found)
    return [*found, *torch.autograd.grad(total, [x, *layer.parameters()])]


@pytest.mark.parametrize("kind", LAYERS)
def test_the_twin_returns_what_torch_returns(kind):
    """Outputs, last states and all gradients, to rounding: layers, directions, biases, either axis first, packed."""
    make, options = LAYERS[kind]
    torch.manual_seed(0)
    for bidirectional, bias, first, packed in itertools.product((False, True), repeat=4):
        layer = make(3, 5, 2, bias=bias, bidirectional=bidirectional, batch_first=first, **options).double()
        x = (dense.randn(4, 6, 3) if first else dense.randn(6, 4, 3)).requires_grad_()
        wanted = answers(layer, x, packed)
        with Unrolled():
            found = answers(layer, x, packed)
        for a, b in zip(found, wanted, strict=True):
            assert dense.relative_error(a, b) < 1e-13


@pytest.mark.parametrize("make", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_the_twin_of_a_cell(make):
    torch.manual_seed(0)
    cell, x = make(3, 5).double(), dense.randn(4, 3)
    wanted = cell(x)
    with Unrolled():
        found = cell(x)
    for a, b in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        dense.assert_exact(a, b, 1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_twin_takes_no_more_than_three_times_as_long(make):
    """Forward and backward, interleaved, medians; 128 units, 64 sequences of 100 steps."""
    layer, x = make(128, 128, batch_first=True), torch.randn(64, 100, 128)

    def seconds() -> float:
        start = time.perf_counter()
        layer(x)[0].sum().backward()
        return time.perf_counter() - start

    fused, twin = [], []
    for _ in range(9):
        fused.append(seconds())
        with Unrolled():
            twin.append(seconds())
    ratio = statistics.median(twin[2:]) / statistics.median(fused[2:])
    print(f"{make.__name__}: {ratio:.2f} times the fused layer")
    assert ratio < 3


# ------------------------------------------------------------------------------------ factors against cells by hand


class ByHand(nn.Module):
    """A layer as two linear ones, called at every step; `inner` and `outer` take the parameters of torch's."""

    def __init__(self, kind: str, layer: nn.Module):
        super().__init__()
        self.kind = kind
        d_in, hidden = layer.input_size, layer.hidden_size
        gates = layer.weight_ih_l0.shape[0]
        self.outer, self.inner = nn.Linear(d_in, gates).double(), nn.Linear(hidden, gates).double()
        with torch.no_grad():
            for own, name in ((self.outer, "ih"), (self.inner, "hh")):
                own.weight.copy_(getattr(layer, f"weight_{name}_l0"))
                own.bias.copy_(getattr(layer, f"bias_{name}_l0"))

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), self.inner.in_features)
        outputs = []
        for t in range(x.shape[1]):
            of_x, of_h = self.outer(x[:, t]), self.inner(h)
            if self.kind == "lstm":
                i, f, g, o = (of_x + of_h).chunk(4, 1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
            elif self.kind == "gru":
                (r_x, z_x, n_x), (r_h, z_h, n_h) = of_x.chunk(3, 1), of_h.chunk(3, 1)
                z = torch.sigmoid(z_x + z_h)
                h = (1 - z) * torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h) + z * h
            else:
                h = torch.tanh(of_x + of_h)
            outputs.append(h)
        return torch.stack(outputs, 1)


class Read(nn.Module):
    def __init__(self, layer: nn.Module, last: bool):
        super().__init__()
        self.layer, self.last, self.head = layer, last, nn.Linear(4, 2).double()
        with torch.no_grad():
            for p in self.head.parameters():
                p.fill_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        out = out if isinstance(out, Tensor) else out[0]
        return self.head(torch.tanh(out[:, -1] if self.last else out))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh"])
def test_factors_are_those_of_a_cell_by_hand(kind, last, sharing):
    make = LAYERS[kind][0]
    torch.manual_seed(0)
    layer, x = make(3, 4, batch_first=True).double(), dense.randn(3, 5, 3)
    model, twin = Read(layer, last), Read(ByHand(kind, layer), last)
    found, wanted = (dense.kfac_factors(m, x, weight_sharing=sharing) for m in (model, twin))
    for name, other in (("layer.weight_ih_l0", "layer.outer"), ("layer.weight_hh_l0", "layer.inner")):
        dense.assert_factors_equal({"": found[name]}, {"": wanted[other]})
    dense.assert_factors_equal({"": found["head"]}, {"": wanted["head"]})


def test_one_step_of_time_of_one_example_is_exact():
    for kind in ("lstm", "gru", "tanh"):
        torch.manual_seed(0)
        layer = LAYERS[kind][0](3, 4, batch_first=True).double()
        model, x = Read(layer, True), dense.randn(1, 1, 3)
        factors = dense.kfac_factors(model, x)
        block = dense.fisher_block(model, x, "layer.weight_ih_l0", "layer.bias_ih_l0")
        assert dense.relative_error(dense.kron(factors["layer.weight_ih_l0"]), block) <= dense.EXACT
        longer = dense.randn(3, 4, 3)
        block = dense.fisher_block(model, longer, "layer.weight_ih_l0", "layer.bias_ih_l0")
        found = dense.kron(dense.kfac_factors(model, longer)["layer.weight_ih_l0"])
        assert dense.relative_error(found, block) > dense.DIFFERENT


class Loop(nn.Module):
    """Cells in a loop of the user's own."""

    def __init__(self, kind: str, layer: nn.Module):
        super().__init__()
        self.cell = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "tanh": nn.RNNCell}[kind](3, 4).double()
        with torch.no_grad():
            for name, p in self.cell.named_parameters():
                p.copy_(getattr(layer, f"{name}_l0"))

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)


@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh"])
def test_cells_in_a_loop_are_the_layer(kind):
    """Factors, and with temporal="chain" the moments of neighbours in time."""
    torch.manual_seed(0)
    layer, x = LAYERS[kind][0](3, 4, batch_first=True).double(), dense.randn(3, 5, 3)
    states = []
    for model in (Read(layer, False), Read(Loop(kind, layer), False)):
        optimizer = KFAC(model, likelihood="gaussian", fisher="exact", lr=0.0, temporal="chain", compile=False)
        model(x).sum().backward()
        optimizer.step()
        named = {name.removesuffix("_l0").split(".")[-1]: p for name, p in model.layer.named_parameters()}
        states.append({n: optimizer.state[named[n]] for n in ("weight_ih", "weight_hh")})
    for name in states[0]:
        for key in ("A_lag", "G_lag", "time_steps"):
            dense.assert_exact(states[1][name][key], states[0][name][key])


@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh", "lstm, projected"])
@pytest.mark.parametrize("packed", [False, True])
def test_everything_recurrent_is_covered(kind, packed):
    make, options = LAYERS[kind]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make(3, 4, 2, bidirectional=True, batch_first=True, **options)
            self.head = nn.Linear(2 * (options.get("proj_size") or 4), 3)

        def forward(self, x):
            given = pack_padded_sequence(x, LENGTHS, batch_first=True) if packed else x
            out = self.layer(given)[0]
            return self.head(pad_packed_sequence(out, batch_first=True)[0] if packed else out)

    model, x = Model(), torch.randn(4, 6, 3)
    optimizer = KFAC(model, likelihood="categorical", lr=0.01, compile=False)
    expected = optimizer.coverage()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), torch.arange(24) % 3).backward()
        optimizer.step()
    assert optimizer.coverage() == expected
    assert set(expected.values()) == {"recurrent", "linear"}


def test_packed_sequences_take_no_reduce():
    """Their rows stand by time, each step with fewer of them, and belong to no even number of positions."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.GRU(3, 4, batch_first=True)

        def forward(self, x):
            return self.layer(pack_padded_sequence(x, LENGTHS, batch_first=True))[1][0]

    model = Model()
    optimizer = KFAC(model, likelihood="gaussian", weight_sharing="reduce", compile=False)
    model(torch.randn(4, 6, 3)).square().sum().backward()
    with pytest.raises(ValueError, match="use weight_sharing='expand'"):
        optimizer.step()


def test_adaptive_modes_go_through_the_twin():
    """The products with the exact Fisher need forward-mode derivatives, which torch's LSTM on a CPU lacks."""
    torch.manual_seed(0)
    model, x = Read(nn.LSTM(3, 4, batch_first=True).double(), True), dense.randn(40, 5, 3)
    y = x.sum(1)[:, :2]
    optimizer = KFAC.paper(model, likelihood="gaussian", loss_scale=1.0)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().sum(1).mean() / 2
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]


# -------------------------------------------------------------------------------------------- chains of times (E15)


def stationary(d: int, seed: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """C0 and C1 of a stationary process of first order; Psi = C1 C0^-1 is stable."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(2 * d, d, generator=generator, dtype=F64)
    C0 = X.T @ X / (2 * d)
    values, vectors = torch.linalg.eigh(C0)
    root = vectors * values.sqrt() @ vectors.T
    M = torch.randn(d, d, generator=generator, dtype=F64)
    M = (M + M.T) / 2 if symmetric else M
    M = 0.8 * M / torch.linalg.matrix_norm(M, 2)
    return C0, root @ M @ root


def summed(F0: Tensor, F1: Tensor, steps: int) -> Tensor:
    """cov of the sum of w_1 ... w_T, F_d = Psi^d F_0, by adding all of it up."""
    Psi = F1 @ torch.linalg.inv(F0)
    total, Fd = steps * F0, F0
    for d in range(1, steps):
        Fd = Psi @ Fd
        total = total + (steps - d) * (Fd + Fd.T)
    return total


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_symmetric_chain_is_the_dense_inverse(steps):
    A0, A1 = stationary(4, 1, symmetric=True)
    G0, G1 = stationary(3, 2, symmetric=True)
    V = dense.randn(3, 4)
    dense_sum = summed(torch.kron(G0, A0), torch.kron(G1, A1), steps)
    wanted = torch.linalg.solve(dense_sum / steps, V.flatten()).view(3, 4)
    found = transform(A0, G0, A1, G1, steps, 0.0, symmetric=True)
    dense.assert_exact(product(V, found), wanted)
    if steps > 1:
        independent = torch.linalg.solve(torch.kron(G0, A0), V.flatten()).view(3, 4)
        assert dense.relative_error(independent, wanted) > dense.DIFFERENT


def test_the_chain_is_the_dense_inverse_of_an_endless_sum():
    A0, A1 = stationary(4, 1, symmetric=False)
    G0, G1 = stationary(3, 2, symmetric=False)
    F0, F1 = torch.kron(G0, A0), torch.kron(G1, A1)
    Psi, V = F1 @ torch.linalg.inv(F0), dense.randn(3, 4)
    total, Fd = F0.clone(), F0
    for _ in range(400):
        Fd = Psi @ Fd
        total = total + Fd + Fd.T
    wanted = torch.linalg.solve(total, V.flatten()).view(3, 4)
    dense.assert_exact(product(V, transform(A0, G0, A1, G1, 400, 0.0, symmetric=False)), wanted)
    symmetric = product(V, transform(A0, G0, A1, G1, 400, 0.0, symmetric=True))
    assert dense.relative_error(symmetric, wanted) > dense.DIFFERENT  # this process is not


@pytest.mark.parametrize("steps", [(3, 3, 3, 3), (4, 3, 3, 1), (5,)])
def test_moments_of_neighbours_by_loops(steps):
    """Row i of a step continues row i of the one before; ended sequences have no later rows."""
    weight = nn.Parameter(torch.zeros(2, 3, dtype=F64))
    n = sum(steps)
    x, dys = dense.randn(n, 3), [dense.randn(n, 2, seed=s) for s in (5, 6)]
    use = RecurrentUse(Part(weight, 0, 2), None, x, steps=steps)
    seen = SeenUse(Recorded(use, None, torch.Size((n, 2))), dys, 0, steps[0])
    layer = Layer(weight, None, Layout("recurrent"))
    own = Sample(layer, [x], dys, 7.0, n, ones=False, uses=[seen])
    A_lag, G_lag, length = moments_of_neighbours(own, F64)
    starts = [sum(steps[:t]) for t in range(len(steps))]
    A, G, pairs = torch.zeros(3, 3, dtype=F64), torch.zeros(2, 2, dtype=F64), 0
    for t in range(1, len(steps)):
        for i in range(steps[t]):
            before, after = starts[t - 1] + i, starts[t] + i
            A += torch.outer(x[after], x[before])
            G += sum(torch.outer(dy[after], dy[before]) for dy in dys)
            pairs += 1
    dense.assert_exact(A_lag, A * n / 7 / max(pairs, 1))
    dense.assert_exact(G_lag, G / max(pairs, 1))
    assert float(length) == n / steps[0]


@pytest.mark.parametrize("form", ["chain_symmetric", "chain"])
def test_a_step_in_time_is_the_transform_of_its_gradient(form):
    torch.manual_seed(0)
    model, x = Read(nn.GRU(3, 4, batch_first=True).double(), False), dense.randn(8, 6, 3)
    options = {"likelihood": "gaussian", "momentum": 0.0, "kl_clip": None, "compile": False, "factor_fraction": 1.0}
    optimizer = KFAC(model, lr=1.0, damping=0.1, fisher="exact", temporal=form, **options)
    estimate = optimizer.memory_usage()
    weight, bias = model.layer.weight_hh_l0, model.layer.bias_hh_l0
    before = torch.cat([weight, bias[:, None]], 1).detach().clone()
    model(x).square().mean().backward()
    optimizer.step()
    state = optimizer.state[weight]
    own = transform(state["A"], state["G"], state["A_lag"], state["G_lag"], 6, 0.1, symmetric=form != "chain")
    grad = torch.cat([weight.grad, bias.grad[:, None]], 1)
    dense.assert_exact(before - torch.cat([weight, bias[:, None]], 1).detach(), product(grad, own))
    names = ("A", "G", "A_lag", "G_lag")
    blocks = [s for s in optimizer.state.values() if "A" in s]
    assert estimate["factors"] == sum(s[n].nbytes for s in blocks for n in names if n in s)
    held = [n for n in state if n.startswith("time_") and n != "time_steps"]
    assert estimate["inverses"] == sum(s[n].nbytes for s in blocks for n in ("A_inv", "G_inv", *held) if n in s)


def test_chains_resume_to_the_bit_and_leave_when_another_form_loads_them():
    torch.manual_seed(0)
    layer, x = nn.LSTM(3, 4, batch_first=True).double(), dense.randn(8, 6, 3)
    model = Read(layer, False)

    def trained(model: nn.Module, optimizer: KFAC, steps: int) -> list[Tensor]:
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    def fresh(form: str) -> tuple[nn.Module, KFAC]:
        twin = Read(nn.LSTM(3, 4, batch_first=True).double(), False)
        twin.load_state_dict(model.state_dict())
        return twin, KFAC(twin, likelihood="gaussian", lr=0.1, temporal=form, compile=False)

    optimizer = KFAC(model, likelihood="gaussian", lr=0.1, temporal="chain", compile=False)
    trained(model, optimizer, 3)
    saved = optimizer.state_dict()
    for form in ("chain", "independent"):
        twin, other = fresh(form)
        other.load_state_dict(saved)
        assert ("time_K_A" in other.state[twin.layer.weight_hh_l0]) == (form == "chain")
        if form == "chain":
            again = trained(twin, other, 3)
    wanted = trained(model, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temporal": "ar1"}, "temporal must be one of 'independent', 'chain_symmetric', 'chain'"),
        ({"temporal": "chain", "approximation": "eigen"}, 'temporal must be "independent" with approximation="eigen"'),
        ({"temporal": "chain", "fisher": "empirical"}, 'temporal must be "independent" with fisher="empirical"'),
        ({"temporal": "chain", "weight_sharing": "reduce"}, 'temporal must be "independent" with weight_sharing="redu'),
        ({"spatial": "uncorrelated", "weight_sharing": {"x": "reduce"}}, 'spatial must be "correlated" with weight_sh'),
    ],
)
def test_what_chains_do_not_take(options, message):
    with pytest.raises(ValueError, match=message):
        KFAC(nn.LSTM(3, 4), likelihood="gaussian", **options)
