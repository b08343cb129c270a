"""Inputs of any kind, and which of them a part may be cut from."""

from __future__ import annotations

import copy
import enum
import logging
import math
from collections import namedtuple
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import WHOLE, closure_step, data, second_moment, train_step
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from kfac_triton import KFAC
from kfac_triton.steps import quadratic

FORMS = {"plain": (KFAC, train_step), "paper": (KFAC.paper, closure_step)}


def trained(form: str, m: nn.Module, args: tuple[Any, ...], y: Tensor, steps: int = 8) -> tuple[KFAC, list[float]]:
    """The optimizer and the losses of some steps on m(*args)."""
    make, step = FORMS[form]
    o = make(m, likelihood="categorical", compile=False)
    return o, [step(o, lambda _: m(*args), y, y) for _ in range(steps)]


class Two(nn.Module):
    """Two linear layers; `sizes` are the first axes of what the first one received."""

    sizes: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        type(self).sizes = []  # not in the instance, whose attributes K-FAC's own passes put back

    def hidden(self, x: Tensor) -> Tensor:
        self.sizes.append(x.shape[0])
        return torch.tanh(self.a(x))

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        return self.b(self.hidden(x))


# ---------------------------------------------------------------------------------------------- sparse, nested, complex


class Graph(Two):
    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return torch.sparse.mm(adjacency, self.b(torch.relu(torch.sparse.mm(adjacency, self.a(x)))))


def adjacency(layout: str, n: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    dense = (torch.rand(n, n, generator=generator) < 0.03).float() + torch.eye(n)
    return {"coo": dense.to_sparse, "csr": dense.to_sparse_csr, "csc": dense.to_sparse_csc}[layout]()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["coo", "csr", "csc"])
def test_sparse_inputs_train_as_dense_ones(layout, form, caplog):
    x, y = data(200)
    A = adjacency(layout)
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        _, losses = trained(form, Graph(), (x, A), y)
    assert losses[-1] < losses[0] and sum("sparse" in message for message in caplog.messages) == 1
    m = Graph()
    m.forward = lambda x, A: A @ m.b(torch.relu(A @ m.a(x)))
    make, step = FORMS[form]
    whole = {"quadratic_fraction": 1.0} if form == "paper" else {}
    o = make(m, likelihood="categorical", compile=False, factor_fraction=1.0, **whole)
    expected = [step(o, lambda _: m(x, A.to_dense()), y, y) for _ in range(8)]
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)


def test_sparse_gradients_are_refused():
    m = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="sparse=False"):
        trained("plain", m, (torch.arange(9),), torch.zeros(9, dtype=torch.long), steps=1)


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_a_sparse_input_that_was_modified_is_refused(layout):
    x, y = data(200)
    A, m = adjacency(layout), Graph()
    o = KFAC(m, **WHOLE)
    F.cross_entropy(m(x, A), y).backward()
    (A._values() if layout == "coo" else A.values()).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified in place"):
        o.step()


class Jagged(Two):
    def forward(self, x: Tensor) -> Tensor:
        parts = torch.tanh(self.a(x)).unbind() if x.is_nested else torch.tanh(self.a(x)).split(SIZES)
        return self.b(torch.stack([part.sum(0) for part in parts]))


SIZES = [2 + i % 3 for i in range(150)]


@pytest.mark.parametrize("form", FORMS)
def test_jagged_inputs_train_as_their_rows(form):
    parts = [torch.randn(size, 6, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(SIZES)]
    y = torch.randint(3, (150,))
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged)
    o, losses = trained(form, Jagged(), (jagged,), y)
    _, expected = trained(form, Jagged(), (torch.cat(parts),), y)
    assert losses[-1] < losses[0]
    # in the second form products are differences of outputs, since torch has no second derivative of nested tensors
    torch.testing.assert_close(losses, expected, rtol=1e-3 if form == "plain" else 2e-2, atol=0.0)
    assert set(o.coverage().values()) == {"linear"}


def test_scales_and_strided_nested_tensors_fall_back(caplog):
    class Normed(Two):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.n = nn.Embedding(7, 6), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.n(torch.tanh(self.a(self.e(x))))
            return self.b(torch.nested.to_padded_tensor(h, 0.0).sum(1))

    tokens = torch.nested.nested_tensor([torch.randint(7, (n,)) for n in SIZES], layout=torch.jagged)
    o, losses = trained("plain", Normed(), (tokens,), torch.randint(3, (150,)))
    assert losses[-1] < losses[0]
    assert o.coverage() | {"n.weight": "fallback", "n.bias": "fallback"} == o.coverage()
    assert o.coverage()["e.weight"] == "embedding" and o.coverage()["a.weight"] == "linear"

    class Strided(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.nested.to_padded_tensor(self.a(x), 0.0).sum(1))

    strided = torch.nested.nested_tensor([torch.randn(n, 6) for n in SIZES], layout=torch.strided)
    o, losses = trained("plain", Strided(), (strided,), torch.randint(3, (150,)))
    assert losses[-1] < losses[0]
    assert o.coverage()["a.weight"] == "fallback" and o.coverage()["b.weight"] == "linear"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["complex", "integers", "booleans"])
def test_inputs_of_other_numbers(kind, form):
    class Real(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.view_as_real(x).flatten(1) if x.is_complex() else x.float())

    x, y = data(200)
    given = {"complex": torch.view_as_complex(x.view(200, 3, 2)), "integers": (4 * x).long(), "booleans": x > 0}[kind]
    o, losses = trained(form, Real(), (given,), y)
    assert losses[-1] < losses[0] and set(o.coverage().values()) == {"linear"}


# ---------------------------------------------------------------------------------------- what cannot be cut into parts


@dataclass
class Record:
    x: Tensor


Pair = namedtuple("Pair", ["x", "mask"])


class Mode(enum.Enum):
    TRAIN = 1


N = 512
X, Y = data(N)


def by_graph(self: Two, x: Tensor, segments: Tensor) -> Tensor:
    h = self.hidden(x)
    return self.b(h.new_zeros(int(segments.max()) + 1, 8).index_add(0, segments, h))


def by_pointers(self: Two, x: Tensor, ends: Tensor) -> Tensor:
    h = self.hidden(x)
    return self.b(torch.stack([h[i:j].sum(0) for i, j in pairwise(ends)]))


def by_edges(self: Two, x: Tensor, edges: Tensor) -> Tensor:
    h = self.hidden(x)
    return self.b(h.index_add(0, edges[1], h[edges[0] % len(h)]))


SEGMENTS = torch.arange(64).repeat_interleave(8)
SHUFFLED = SEGMENTS[torch.randperm(N, generator=torch.Generator().manual_seed(0))]
WHOLE_ONLY = {
    "segments": (by_graph, (X, SEGMENTS), Y[:64], "segments"),
    "segments out of order": (by_graph, (X, SHUFFLED), Y[:64], "outputs have shape"),
    "pointers": (by_pointers, (X, torch.arange(0, N + 1, 8)), Y[:64], "first axis"),
    "edges": (by_edges, (X, torch.randint(N, (2, 900))), Y, "first axis"),
    "an adjacency matrix": (lambda m, x, A: m.b(A[:, : len(x)] @ m.hidden(x)), (X, torch.rand(N, N) / N), Y, "square"),
    "every example against every other": (lambda m, x: m.hidden(x) @ m.hidden(x).T, (X,), torch.arange(N), "shape"),
    "an average over the batch": (lambda m, x: m.b(m.hidden(x).mean(0, keepdim=True)), (X,), Y[:1], "shape"),
    "sequences packed": (
        lambda m, x: m.b(m.hidden(x.data))[:256],
        (pack_sequence(list(X.view(256, 2, 6))),),
        Y[:256],
        "first axis",
    ),
    "a record beside": (lambda m, x, r: m.b(m.hidden(x)), (X, Record(X)), Y, "type Record"),
    "a namespace beside": (lambda m, x, r: m.b(m.hidden(x)), (X, SimpleNamespace(x=X)), Y, "type SimpleNamespace"),
    "an array beside": (lambda m, x, r: m.b(m.hidden(x)), (X, np.ones(N)), Y, "type ndarray"),
    "a list beside": (lambda m, x, r: m.b(m.hidden(x)), (X, ["a word"] * N), Y, "type list"),
    "a record alone": (lambda m, r: m.b(m.hidden(r.x)), (Record(X),), Y, "type Record"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", WHOLE_ONLY)
def test_whole_batches_where_a_cut_is_wrong(case, form, caplog):
    forward, args, y, reason = WHOLE_ONLY[case]
    m = Two()
    m.forward = forward.__get__(m)
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        o, _ = trained(form, m, args, y, steps=12)
        m.sizes.clear()
        FORMS[form][1](o, lambda _: m(*args), y, y)
    assert set(m.sizes) == {N}
    assert len(caplog.messages) == 1 and reason in caplog.messages[0] and "factor_fraction" in caplog.messages[0]


CUT = {
    "one tensor": (X,),
    "a number and a 0-d tensor": (X, 3, torch.tensor(0.5), None, "name", torch.float32, Mode.TRAIN),
    "two tensors": (X, Y),
    "a named tuple": (Pair(X, X > 0),),
    "a dictionary": ({"x": X, "mask": X > 0},),
    "a function": (X, torch.tanh),
}


@pytest.mark.parametrize("case", CUT)
def test_parts_where_a_cut_is_right(case, caplog):
    m = Two()
    m.forward = lambda x, *others: m.b(m.hidden(x if isinstance(x, Tensor) else x["x"] if isinstance(x, dict) else x.x))
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        o, _ = trained("plain", m, CUT[case], Y, steps=12)
        m.sizes.clear()
        train_step(o, lambda _: m(*CUT[case]), Y, Y)
    assert m.sizes == [N, 64] and not caplog.messages


def test_outputs_with_several_rows_an_example_are_cut():
    """(2 N, C) from (N, d): a multiple of the examples; and sequences whose length changes are asked for once."""
    m = Two()
    m.forward = lambda x: m.b(m.hidden(x)).repeat_interleave(2, 0)
    o, _ = trained("plain", m, (X,), Y.repeat_interleave(2), steps=12)
    m.sizes.clear()
    train_step(o, m, X, Y.repeat_interleave(2))
    assert m.sizes == [N, 64]


def test_sequences_of_other_lengths_are_compared_with_a_whole_batch_once():
    m = Two()
    o = KFAC(m, likelihood="categorical", compile=False)
    passes = []
    for length in range(1, 15):
        m.sizes.clear()
        x, y = torch.randn(N, length, 6), torch.randint(3, (N, length))
        train_step(o, m, x, y, lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()))
        passes.append(m.sizes[1:])
    assert passes[:2] == [[N], [N // 2, N]] and all(len(own) == 1 and own[0] < N for own in passes[2:])


@pytest.mark.parametrize("fails", [False, True], ids=["parts", "whole batches"])
def test_a_resumed_run_draws_the_same_numbers(fails):
    """It knows no whole batch yet: it asks for the shapes of one with one more pass, or fails on a part once more."""

    class Dropping(Two):
        def forward(self, x: Tensor) -> Tensor:
            h = F.dropout(self.hidden(x), 0.3, self.training)
            if fails and len(x) < N:
                raise ValueError("too few")
            return self.b(h)

    def fresh() -> tuple[Two, KFAC]:
        m = Dropping()
        return m, KFAC(m, likelihood="categorical", compile=False)

    def steps(m: Two, o: KFAC, number: int) -> list[float]:
        torch.manual_seed(number)
        return [train_step(o, m, X, Y) for _ in range(number)]

    m, o = fresh()
    steps(m, o, 5)
    saved = copy.deepcopy((m.state_dict(), o.state_dict()))
    other, resumed = fresh()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    straight = steps(m, o, 6)
    other.sizes.clear()
    assert steps(other, resumed, 6) == straight
    assert other.sizes[:4] == [N, math.ceil(N / 6), N, N]


def test_scalars_alone():
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(1, 3)

        def forward(self, t: Tensor) -> Tensor:
            return self.f(t.reshape(1, 1))

    m = Scalar()
    o, losses = trained("plain", m, (torch.tensor(2.0),), torch.tensor([1]))
    assert losses[-1] < losses[0]
    o = KFAC(m, **WHOLE)
    train_step(o, m, torch.tensor(2.0), torch.tensor([1]))
    torch.testing.assert_close(o.factors()["f"]["A"], second_moment(torch.tensor([[2.0]])))


# ---------------------------------------------------------------------------------- models that take whole batches only


class Failure(BaseException):
    """Not an Exception: an interrupt, for instance."""


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, TypeError, KeyError, LookupError, StopIteration])
@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_takes_whole_batches_only(error, form, caplog):
    class Fixed(Two):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) != N:
                raise error("batch size")
            return super().forward(x)

    m = Fixed()
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        o, losses = trained(form, m, (X,), Y, steps=10)
    assert losses[-1] < losses[0] and len(caplog.messages) == 1 and "batch size" in caplog.messages[0]
    if form == "paper":
        assert o._adaptive._proposer.products._way == 0, "the failure of a part is none of the way"


@pytest.mark.parametrize("form", FORMS)
def test_an_error_on_the_whole_batch_is_the_users(form):
    """The model fails in every pass but the user's own."""

    class Moody(Two):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            if Moody.calls:
                raise KeyError("the second call")
            Moody.calls = 1
            return super().forward(x)

    m = Moody()
    with pytest.raises(KeyError, match="the second call"):
        trained(form, m, (X,), Y, steps=1)


@pytest.mark.parametrize("form", FORMS)
def test_an_interrupt_is_no_failure_of_a_part(form):
    class Interrupted(Two):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) != N:
                raise Failure
            return super().forward(x)

    with pytest.raises(Failure):
        trained(form, Interrupted(), (X,), Y, steps=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_by_differences(dtype):
    """For functions without a forward-mode derivative and without a second one."""
    torch.manual_seed(0)
    m, x = Two().to(dtype), X[:32].to(dtype)
    values = tuple(p.detach() for p in m.parameters())
    tangents = [torch.stack([torch.randn_like(p), torch.zeros_like(p)]) for p in values]

    def outputs(values: tuple[Tensor, ...]) -> Tensor:
        return torch.func.functional_call(m, dict(zip(dict(m.named_parameters()), values, strict=True)), (x,))

    z, products = quadratic._by_differences(lambda: outputs, values, tangents)
    expected_z, expected = quadratic._one_by_one(lambda: outputs, values, tangents)
    assert torch.equal(z, expected_z) and not products[1].any()
    error = (products[0] - expected[0]).norm() / expected[0].norm()
    assert error < 100 * math.pow(torch.finfo(dtype).eps, 2 / 3)


def test_an_embedding_bag_has_a_quadratic_model():
    class Bags(Two):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.EmbeddingBag(20, 6)

        def forward(self, words: Tensor, starts: Tensor) -> Tensor:
            return super().forward(self.e(words, starts))

    words, starts = torch.randint(20, (N,)), torch.arange(0, N, 4)
    o, losses = trained("paper", Bags(), (words, starts), Y[: N // 4], steps=12)
    assert losses[-1] < losses[0] and o.coverage()["e.weight"] == "fallback"
