"""The block-tridiagonal inverse against dense algebra (E13, E14), in float64."""

from __future__ import annotations

import dense
import pytest
import torch
from torch import Tensor

from kfac_triton.linalg import chain

F64 = torch.float64
WIDTHS = {"two": [(4, 3), (3, 2)], "three": [(4, 3), (3, 5), (5, 2)], "four": [(3, 2), (2, 1), (1, 3), (3, 2)]}


def moments(widths: list[tuple[int, int]], seed: int) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """A_ij and G_ij of random, correlated rows for layers of (d_in, d_out)."""
    everything = []
    for side in range(2):
        mixing = dense.randn(12, sum(w[side] for w in widths), seed=seed + side)
        rows = (dense.randn(60, 12, seed=seed + 7 + side) @ mixing).split([w[side] for w in widths], dim=1)
        everything.append([[x.T @ y / 60 for y in rows] for x in rows])
    return everything[0], everything[1]


def case(name: str, damping: float = 0.5):
    """Damped blocks F_ij of the Fisher's approximation, and the links and inverses that the module makes of them."""
    widths = WIDTHS[name]
    A, G = moments(widths, 3)
    for i in range(len(widths)):
        A[i][i] = A[i][i] + damping * torch.eye(len(A[i][i]), dtype=F64)
        G[i][i] = G[i][i] + damping * torch.eye(len(G[i][i]), dtype=F64)
    blocks = [[torch.kron(g, a) for a, g in zip(*rows, strict=True)] for rows in zip(A, G, strict=True)]
    inverses = [(torch.linalg.inv(A[i][i]), torch.linalg.inv(G[i][i])) for i in range(len(widths))]
    links = []
    for i in range(len(widths) - 1):
        found = chain.link(
            A[i][i], G[i][i], A[i][i + 1], G[i][i + 1], A[i + 1][i + 1], inverses[i + 1][0], G[i + 1][i + 1],
            inverses[i + 1][1],
        )  # fmt: skip
        assert found is not None
        links.append(found)
    return widths, blocks, links, inverses[-1]


def as_matrix(name: str) -> tuple[Tensor, list[list[Tensor]], list[int]]:
    """The inverse, column by column from `product`; a gradient (d_out, d_in) is a vector by its rows."""
    widths, blocks, links, (A_inv, G_inv) = case(name)
    sizes = [d_in * d_out for d_in, d_out in widths]
    columns = []
    for unit in torch.eye(sum(sizes), dtype=F64):
        grads = [v.reshape(d_out, d_in) for v, (d_in, d_out) in zip(unit.split(sizes), widths, strict=True)]
        columns.append(torch.cat([v.flatten() for v in chain.product(grads, links, A_inv, G_inv)]))
    return torch.stack(columns, dim=1), blocks, sizes


@pytest.mark.parametrize("name", WIDTHS)
def test_the_fast_product_is_xi_lambda_xi(name):
    found, blocks, sizes = as_matrix(name)
    count = len(sizes)
    Xi, Lambda = torch.eye(sum(sizes), dtype=F64), []
    offsets = [sum(sizes[:i]) for i in range(count + 1)]
    for i in range(count):
        Sigma = blocks[i][i]
        if i + 1 < count:
            Psi = blocks[i][i + 1] @ torch.linalg.inv(blocks[i + 1][i + 1])
            Xi[offsets[i] : offsets[i + 1], offsets[i + 1] : offsets[i + 2]] = -Psi
            Sigma = Sigma - Psi @ blocks[i + 1][i + 1] @ Psi.T
        Lambda.append(torch.linalg.inv(Sigma))
    dense.assert_exact(found, Xi.T @ torch.block_diag(*Lambda) @ Xi)


@pytest.mark.parametrize("name", WIDTHS)
def test_it_matches_the_fisher_on_three_diagonals_and_is_zero_beyond(name):
    found, blocks, sizes = as_matrix(name)
    inverse = torch.linalg.inv(found)
    rows = [row.split(sizes, dim=1) for row in inverse.split(sizes)]
    own = [row.split(sizes, dim=1) for row in found.split(sizes)]
    for i in range(len(sizes)):
        for j in range(len(sizes)):
            if abs(i - j) <= 1:
                dense.assert_exact(rows[i][j], blocks[i][j], 1e-9)
            else:
                assert own[i][j].abs().max() < 1e-12 * found.abs().max()
    far = rows[0][-1]
    if len(sizes) > 2:  # a negative control: beyond the three diagonals it is not the Fisher's approximation
        assert dense.relative_error(far, blocks[0][-1]) > dense.DIFFERENT


def test_for_two_layers_it_is_the_whole_inverse():
    found, blocks, _ = as_matrix("two")
    whole = torch.cat([torch.cat(row, dim=1) for row in blocks])
    dense.assert_exact(found, torch.linalg.inv(whole), 1e-9)


def spd(d: int, seed: int) -> Tensor:
    X = dense.randn(3 * d, d, seed=seed)
    return X.T @ X / (3 * d)


@pytest.mark.parametrize("sizes", [(4, 3), (1, 5), (5, 1)])
def test_the_difference_of_kronecker_products(sizes):
    """E14: C <= A and D <= G, of lower rank."""
    A, G = spd(sizes[0], 1), spd(sizes[1], 2)
    C = 0.9 * A - 0.5 * A[:, :1] @ A[:1] / A[0, 0]
    D = 0.8 * G
    V = dense.randn(sizes[1], sizes[0])
    (K_A, s_A), (K_G, s_G) = chain._joint_basis(A, C), chain._joint_basis(G, D)
    dense.assert_exact(K_A.T @ A @ K_A, torch.eye(sizes[0], dtype=F64))
    dense.assert_exact(K_A.T @ C @ K_A, torch.diag(s_A))
    found = chain.solve_difference(V, K_A, K_G, s_A, s_G)
    expected = torch.linalg.solve(torch.kron(G, A) - torch.kron(D, C), V.flatten())
    dense.assert_exact(found.flatten(), expected)


def test_directions_without_curvature_do_not_explode():
    """C = A and D = G: Sigma vanishes, and the gradient stays what it is in the joint basis."""
    A, G, V = spd(4, 1), spd(3, 2), dense.randn(3, 4)
    (K_A, s_A), (K_G, s_G) = chain._joint_basis(A, 1.5 * A), chain._joint_basis(G, G + 0 * G)
    assert s_A.max() == 1
    found = chain.solve_difference(V, K_A, K_G, s_A.round(decimals=12), s_G.round(decimals=12))
    dense.assert_exact(found, torch.linalg.inv(G) @ V @ torch.linalg.inv(A))


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
def test_a_factor_without_a_root_gives_no_link(bad):
    A = torch.diag(torch.tensor([1.0, bad], dtype=F64))
    assert chain._joint_basis(A, torch.zeros(2, 2, dtype=F64)) is None
