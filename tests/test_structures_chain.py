"""Laws of the tridiagonal structure: the links of a chain of layers that stand in stacks, against dense float64."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import dense
import pytest
import torch
from definitions import DECAY
from laws import DAMPING
from stacks import ALONE, F64, Rows, held_bytes, rows_of, sample_of, spoiled
from torch import Tensor, nn

from kfac_triton.averages import Averages
from kfac_triton.joint import Joint, stacked
from kfac_triton.layer import Layer
from kfac_triton.operations.layout import Layout
from kfac_triton.structures.registry import structure_of
from kfac_triton.structures.tridiagonal import Chain, Place

pytestmark = pytest.mark.usefixtures("matrix_memory")
SHAPES = [(3, 2), (2, 3), (3, 2), (4, 3)]  # the first and the third stand in one stack
BIASES = [True, True, True, False]
DAMPINGS = (*DAMPING, 0.1)


class Bench:
    """A chain of four layers, with the structures and averages of their stacks."""

    def __init__(self, *, imagined: bool = False) -> None:
        self.layers = []
        for (d_out, d_in), bias in zip(SHAPES, BIASES, strict=True):
            weight = nn.Parameter(torch.zeros(d_out, d_in, dtype=F64))
            own = nn.Parameter(torch.zeros(d_out, dtype=F64)) if bias else None
            self.layers.append(Layer(weight, own, Layout("linear", bias=bias)))
        self.stacks = stacked(self.layers, imagined=imagined)
        self.structures = [structure_of(stack, ALONE, "tridiagonal", "independent") for stack in self.stacks]
        at = {id(layer): (n, m) for n, stack in enumerate(self.stacks) for m, layer in enumerate(stack.layers)}
        self.at = [at[id(layer)] for layer in self.layers]
        self.chain = Chain([Place(n, self.structures[n], m) for n, m in self.at], ALONE)
        if not imagined:
            self.averages = Averages(self.stacks, ALONE)
            self.J, self.V = Joint(self.stacks), Joint(self.stacks)

    def update_(self, rows: Sequence[Rows], bad: Sequence[int] = ()) -> None:
        samples = [sample_of(layer, own) for layer, own in zip(self.layers, rows, strict=True)]
        samples = [spoiled(own) if i in bad else own for i, own in enumerate(samples)]
        by_stack: list[list[Any]] = [[None] * len(stack.layers) for stack in self.stacks]
        for own, (number, member) in zip(samples, self.at, strict=True):
            by_stack[number][member] = own
        self.averages.measure_(by_stack)
        moves = self.averages.moves(by_stack, [DECAY] * len(self.layers))
        for structure, own, move in zip(self.structures, by_stack, moves, strict=True):
            structure.update_(own, None, move, [0.1] * len(own))
        self.chain.update_(samples, [moves[number] for number, _ in self.at])

    def refresh_(self) -> None:
        for number, structure in enumerate(self.structures):
            damping = [DAMPINGS[self.at.index((number, i))] for i in range(len(structure.ready))]
            structure.refresh_(range(len(structure.ready)), damping)
        self.chain.refresh_(DAMPINGS)

    def apply(self, grads: Sequence[Tensor]) -> list[Tensor]:
        for grad, place in zip(grads, self.at, strict=True):
            self.J.of(*place).copy_(grad)
        self.chain.apply_(self.J, self.V)
        return [self.V.of(*place).clone() for place in self.at]

    def states(self) -> list[dict[str, Any]]:
        """By layer, through a file."""
        held = [
            {
                **self.structures[n].tensors(m),
                **self.averages.tensors(self.stacks[n].first + m),
                **self.chain.tensors(i),
            }
            for i, (n, m) in enumerate(self.at)
        ]
        file = io.BytesIO()
        torch.save(held, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        by_stack = [[states[self.at.index((n, m))] for m in range(len(s.layers))] for n, s in enumerate(self.stacks)]
        for structure, own in zip(self.structures, by_stack, strict=True):
            structure.restore(own)
        self.averages.restore([one for own in by_stack for one in own])
        self.chain.restore(states)


def rows_at(bench: Bench, step: int) -> list[Rows]:
    return [rows_of(layer, 10 * step + i, n=9) for i, layer in enumerate(bench.layers)]


class Definition:
    """All blocks of the Fisher of the chain that the structure keeps, averaged by the rule of the factors."""

    def __init__(self) -> None:
        self.k = 0
        self.A: dict[tuple[int, int], Any] = {}
        self.G: dict[tuple[int, int], Any] = {}

    def update(self, rows: Sequence[Rows]) -> None:
        self.k += 1
        beta = min(1 - 1 / self.k, DECAY)
        for i in range(4):
            for j in range(i, min(i + 2, 4)):
                A = rows[i].a[0].T @ rows[j].a[0] / rows[i].terms
                G = rows[i].g[0][0].T @ rows[j].g[0][0] / rows[i].count
                for F, new in ((self.A, A), (self.G, G)):
                    F[i, j] = beta * F.get((i, j), 0.0) + (1 - beta) * new

    def solved(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Xi^T Lambda Xi times the gradients; factored damping on the diagonal blocks alone."""
        A, G = dict(self.A), dict(self.G)
        for i, damping in enumerate(DAMPINGS):
            gamma = damping**0.5
            pi = (A[i, i].diagonal().mean() / G[i, i].diagonal().mean()).sqrt()
            A[i, i] = A[i, i] + pi * gamma * torch.eye(len(A[i, i]), dtype=F64)
            G[i, i] = G[i, i] + gamma / pi * torch.eye(len(G[i, i]), dtype=F64)
        sizes = [grad.numel() for grad in grads]
        starts = [sum(sizes[:i]) for i in range(5)]
        Xi, Lambda = torch.eye(sum(sizes), dtype=F64), []
        for i in range(4):
            Sigma = torch.kron(G[i, i], A[i, i])
            if i < 3:
                after = torch.kron(G[i + 1, i + 1], A[i + 1, i + 1])
                Psi = torch.kron(G[i, i + 1], A[i, i + 1]) @ torch.linalg.inv(after)
                Xi[starts[i] : starts[i + 1], starts[i + 1] : starts[i + 2]] = -Psi
                Sigma = Sigma - Psi @ after @ Psi.T
            Lambda.append(torch.linalg.inv(Sigma))
        V = Xi.T @ torch.block_diag(*Lambda) @ Xi @ torch.cat([grad.flatten() for grad in grads])
        return [v.view(grad.shape) for v, grad in zip(V.split(sizes), grads, strict=True)]


def gradients(seed: int = 0) -> list[Tensor]:
    return [dense.randn(o, i + bias, seed=seed + o + i) for (o, i), bias in zip(SHAPES, BIASES, strict=True)]


def trained(steps: int, *, refused: int | None = None) -> tuple[Bench, Definition]:
    bench, wanted = Bench(), Definition()
    for step in range(steps):
        rows = rows_at(bench, step)
        bench.update_(rows, bad=range(4) if step == refused else ())
        if step != refused:
            wanted.update(rows)
    bench.refresh_()
    return bench, wanted


@pytest.mark.parametrize("refused", [None, 0, 2])
@pytest.mark.parametrize("steps", [1, 5])
def test_products_are_those_of_the_dense_inverse(steps, refused):
    """A refused pass is as if it had not been, the first one too."""
    if steps == 1 and refused is not None:
        pytest.skip("nothing is left")
    bench, wanted = trained(steps, refused=refused)
    assert bench.chain.linked
    for V, expected in zip(bench.apply(gradients()), wanted.solved(gradients()), strict=True):
        dense.assert_exact(V, expected, 1e-8)


@pytest.mark.parametrize("bad", [0, 2, 3])
def test_a_refused_layer_leaves_the_links_on_both_of_its_sides(bad):
    bench, _ = trained(3)
    before = bench.states()
    bench.update_(rows_at(bench, 3), bad=[bad])
    after = bench.states()
    moved = [not torch.equal(after[i]["A_next"], before[i]["A_next"]) for i in range(3)]
    assert moved == [bad not in (i, i + 1) for i in range(3)]
    assert all(torch.isfinite(own["A_next"]).all() for own in after[:3])


def test_a_state_goes_through_a_file_to_the_bit():
    bench, _ = trained(3)
    twin = Bench()
    twin.restore(bench.states())
    assert twin.chain.linked
    for again in range(2):
        torch.testing.assert_close(twin.states(), bench.states(), rtol=0, atol=0)
        assert all(map(torch.equal, twin.apply(gradients(again)), bench.apply(gradients(again))))
        for one in (bench, twin):
            one.update_(rows_at(bench, 7 + again))
            one.refresh_()


def test_bytes_are_those_of_the_tensors_that_are_held():
    bench, _ = trained(2)
    kinds = {"factors": ("A_next", "G_next"), "inverses": ("link_",)}
    held = [bench.chain.tensors(i) for i in range(4)]
    for kind, names in kinds.items():
        wanted = held_bytes(t for own in held for name, t in own.items() if name.startswith(names))
        assert bench.chain.nbytes()[kind] == wanted == Bench(imagined=True).chain.nbytes()[kind]


def test_layers_of_one_stack_are_linked_in_the_order_of_the_chain():
    bench = Bench()
    assert bench.at[0][0] == bench.at[2][0]
    shapes = [own["A_next"].shape for own in map(bench.chain.tensors, range(3))]
    widths = [i + bias for (_, i), bias in zip(SHAPES, BIASES, strict=True)]
    assert shapes == [torch.Size(pair) for pair in pairwise(widths)]
