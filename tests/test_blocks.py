"""Every block against the dense Fisher, in float64, wherever theory says that they are equal, and away from it not.

Convolutions of every kind by loops over patches (E23), tables, positions, scales and shifts by a dense Jacobian, tied
tables by what their product adds, and layers of a user's own.
"""

from __future__ import annotations

import copy
import itertools

import dense
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_triton import KFAC, LayerBlock

F64 = torch.float64


def exact_factors(model: nn.Module, *batches, **options):
    return dense.kfac_factors(model.double(), *batches, **options)


# ------------------------------------------------------------------------------------------------- convolutions (E23)

# axes, kernel, stride, padding, dilation, groups
CONVS = {
    "3d": (3, (2, 3, 2), (1, 2, 1), (1, 0, 1), (1, 1, 2), 1),
    "3d groups": (3, (2, 2, 2), (1, 1, 1), (0, 1, 0), (1, 1, 1), 2),
    "3d depthwise": (3, (2, 1, 2), (2, 1, 1), (1, 1, 1), (2, 1, 1), 4),
}


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("case", CONVS)
def test_a_convolution_over_three_axes_by_loops(case, mode):
    _, kernel, stride, padding, dilation, groups = CONVS[case]
    conv = nn.Conv3d(4, 8, kernel, stride, padding, dilation, groups, padding_mode=mode)
    model = dense.random_model(conv, nn.Tanh())
    x = dense.randn(2, 4, 4, 5, 4)
    factors = exact_factors(model, x, weight_sharing="expand")["0"]
    padded = x if mode == "zeros" else F.pad(x, conv._reversed_padding_repeated_twice, mode)
    patches = dense.patches(padded, kernel, stride, padding if mode == "zeros" else (0, 0, 0), dilation)
    y = model[0](x)
    L = y[:, 0].numel() * y.shape[1]  # of 4-d outputs the last axis is the likelihood's; Tanh keeps their places
    for group in range(groups):
        channels = 4 // groups
        taps = patches.unflatten(2, (4, -1))[:, :, group * channels : (group + 1) * channels].flatten(2).flatten(0, 1)
        a = torch.cat([taps, taps.new_ones(len(taps), 1)], 1)
        A = factors["A"] if groups == 1 else factors["A"][group]
        dense.assert_exact(A, a.T @ a / (L // y.shape[-1]))


TRANSPOSED = {  # axes, channels in, out, and the arguments of the layer
    "1d": (1, 3, 2, {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}),
    "2d": (2, 2, 3, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)}),
    "2d groups": (2, 4, 6, {"kernel_size": 2, "stride": 2, "groups": 2}),
    "2d cropped": (2, 2, 2, {"kernel_size": 2, "stride": 3, "padding": 1, "output_padding": (2, 0)}),
    "3d": (3, 2, 2, {"kernel_size": 2, "stride": (1, 2, 1), "padding": (0, 1, 0)}),
}


def images(axes: int, channels: int, examples: int = 1) -> Tensor:
    return dense.randn(examples, channels, *(4, 3, 3)[:axes])


class Pixels(nn.Module):
    """Channels last, so that every output position is a loss term."""

    def forward(self, y: Tensor) -> Tensor:
        return y.movedim(1, -1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", TRANSPOSED)
def test_a_transposed_convolution_with_a_term_for_every_pixel_is_exact(case, bias):
    """Positions do not mix, and gradients of a squared error are the same everywhere (expand)."""
    axes, channels, out, options = TRANSPOSED[case]
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1](channels, out, bias=bias, **options)
    model, x = dense.random_model(layer, Pixels()), images(axes, channels, 2)
    factors = exact_factors(model, x)["0"]
    groups = options.get("groups", 1)
    block = dense.fisher_block(model, x, "0.weight")
    W = layer.weight
    full = block.view(*W.shape, *W.shape)
    pairs = [(factors["A"], factors["G"])] if groups == 1 else zip(factors["A"], factors["G"], strict=True)
    for group, (A, G) in enumerate(pairs):
        size = channels // groups
        own = slice(group * size, (group + 1) * size)
        part = full[own].movedim(2 + axes, 0)[own].movedim(0, 2 + axes)
        d_in = size * W[0, 0].numel()
        order = [part.dim() // 2 * half + axis for half in (0, 1) for axis in (1, 0, *range(2, 2 + axes))]
        wanted = part.permute(order).reshape(len(G) * d_in, -1)
        found = torch.kron(G, A[:d_in, :d_in])
        assert dense.relative_error(found, wanted) <= dense.EXACT
        if bias:
            dense.assert_exact(A[-1, -1], torch.ones((), dtype=F64))


@pytest.mark.parametrize("case", TRANSPOSED)
def test_a_step_of_a_transposed_convolution_is_the_dense_solve(case):
    """V = G_inv grad A_inv through the layout, groups and all."""
    axes, channels, out, options = TRANSPOSED[case]
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1](channels, out, **options)
    model, x = dense.random_model(layer, Pixels()), images(axes, channels, 3)
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = KFAC(model, lr=1.0, momentum=0.0, damping=0.1, kl_clip=None, likelihood="gaussian", fisher="exact",
                     compile=False, factor_fraction=1.0)  # fmt: skip
    model(x).sin().mean().backward()
    optimizer.step()
    factors, groups = optimizer.factors()["0"], options.get("groups", 1)

    def matrices(weight: Tensor, bias: Tensor) -> list[Tensor]:
        by_group = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)  # (groups, out / groups, in * taps)
        return [
            torch.cat([w, b[:, None]], 1) for w, b in zip(by_group.transpose(0, 0), bias.chunk(groups), strict=True)
        ]

    grads = matrices(layer.weight.grad, layer.bias.grad)
    moved = matrices(before[0] - layer.weight.detach(), before[1] - layer.bias.detach())
    for i, (grad, move) in enumerate(zip(grads, moved, strict=True)):
        A, G = (factors[s] if groups == 1 else factors[s][i] for s in "AG")
        A_inv, G_inv = dense.damped_inverses(A, G, 0.1)
        dense.assert_exact(move, G_inv @ grad @ A_inv)


LAID_OUT = {
    "3d": (lambda: nn.Conv3d(4, 4, 2, groups=2), (2, 4, 3, 4, 3), torch.channels_last_3d),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 3, 4), torch.channels_last),
    "uncorrelated": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 4), torch.channels_last),
}


@pytest.mark.parametrize("case", LAID_OUT)
def test_either_layout_in_memory_gives_the_same_step(case):
    make, shape, layout = LAID_OUT[case]
    model, x = dense.random_model(make(), nn.Tanh(), nn.Flatten()), dense.randn(*shape)
    twin = dense.random_model(make(), nn.Tanh(), nn.Flatten()).to(memory_format=layout)
    options = {"likelihood": "gaussian", "fisher": "exact", "factor_fraction": 1.0, "compile": False}
    options |= {"spatial": "uncorrelated"} if case == "uncorrelated" else {}
    found = []
    for m, given in ((model, x), (twin, x.to(memory_format=layout))):
        optimizer = KFAC(m, lr=0.5, damping=0.1, **options)
        for _ in range(2):
            optimizer.zero_grad()
            m(given).sin().sum().backward()
            optimizer.step()
        found.append((optimizer.factors(), [p.detach().contiguous() for p in m.parameters()]))
    assert twin[0].weight.is_contiguous(memory_format=layout)
    dense.assert_factors_equal(found[1][0], found[0][0])
    for p, q in zip(found[1][1], found[0][1], strict=True):
        dense.assert_exact(p, q)


def test_uncorrelated_pixels_are_what_the_full_factor_averages_to():
    """S: the mean over taps of A's blocks, and of its border; the rest of A follows from them."""
    for groups, bias in itertools.product((1, 2), (True, False)):
        conv = nn.Conv2d(4, 4, (3, 2), stride=(2, 1), padding=(1, 1), dilation=(1, 2), groups=groups, bias=bias)
        model = dense.random_model(conv, nn.Tanh(), nn.Flatten())
        x = dense.randn(3, 4, 5, 6) + 0.5
        full, simple = (exact_factors(model, x, spatial=s)["0"] for s in ("correlated", "uncorrelated"))
        dense.assert_exact(simple["G"], full["G"])
        with_ones = dense.random_model(nn.Conv2d(4, 4, (3, 2), (2, 1), (1, 1), (1, 2), groups), nn.Tanh(), nn.Flatten())
        A = exact_factors(with_ones, x)["0"]["A"]
        for found, whole in zip(simple["A"].view(groups, -1, simple["A"].shape[-1]), A.view(groups, -1, A.shape[-1]),
                                strict=True):  # fmt: skip
            taps, C = 6, 4 // groups
            blocks = whole[:-1, :-1].view(C, taps, C, taps)
            S = blocks.diagonal(dim1=1, dim2=3).mean(-1)
            s, t = whole[:-1, -1].view(C, taps).mean(1), whole[-1, -1]
            same = torch.eye(taps, dtype=F64)
            wanted = torch.einsum("cd,st->csdt", S - torch.outer(s, s) / t, same)
            wanted = wanted + torch.einsum("c,d->cd", s, s)[:, None, :, None] / t
            wanted = wanted.expand(C, taps, C, taps).reshape(C * taps, -1)
            dense.assert_exact(found[: C * taps, : C * taps], wanted)
            if bias:
                dense.assert_exact(found[-1, :-1], s.repeat_interleave(taps))
        assert groups > 1 or dense.relative_error(simple["A"], full["A"]) > dense.DIFFERENT


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_inverse_of_uncorrelated_pixels_is_the_dense_one(groups, bias):
    conv = nn.Conv2d(4, 6, 3, groups=groups, bias=bias)
    model, x = dense.random_model(conv, nn.Tanh(), nn.Flatten()), dense.randn(5, 4, 5, 5) + 0.3
    before = [p.detach().clone() for p in conv.parameters()]
    optimizer = KFAC(model, lr=1.0, momentum=0.0, damping=0.1, kl_clip=None, likelihood="gaussian", fisher="exact",
                     spatial="uncorrelated", compile=False, factor_fraction=1.0)  # fmt: skip
    model(x).sin().mean().backward()
    optimizer.step()
    assert optimizer.coverage()["0.weight"] == "conv (uncorrelated A)"
    assert optimizer.state[conv.weight]["A"].shape[-1] == 4 // groups + 1
    factors = optimizer.factors()["0"]

    def matrices(tensors: list[Tensor]) -> list[Tensor]:
        columns = [tensors[0].flatten(1), *(t[:, None] for t in tensors[1:])]
        return list(torch.cat(columns, 1).chunk(groups))

    grads = matrices([p.grad for p in conv.parameters()])
    moved = matrices([q - p.detach() for p, q in zip(conv.parameters(), before, strict=True)])
    for i, (grad, move) in enumerate(zip(grads, moved, strict=True)):
        A, G = (factors[s] if groups == 1 else factors[s][i] for s in "AG")
        A_inv, G_inv = dense.damped_inverses(A, G, 0.1)
        dense.assert_exact(move, G_inv @ grad @ A_inv)


# ------------------------------------------------------------------------------------------------ tables and positions


class Looked(nn.Module):
    """Tokens, positions, and a linear layer on both."""

    def __init__(self, padding_idx=None, hidden=3):
        super().__init__()
        self.table = nn.Embedding(7, hidden, padding_idx=padding_idx)
        self.places = nn.Parameter(dense.randn(1, 6, hidden))
        self.shift = nn.Parameter(dense.randn(hidden, seed=5))
        self.head = nn.Linear(hidden, 2)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens) + self.places[:, : tokens.shape[1]] + self.shift)


TOKENS = torch.tensor([[1, 2, 2, 0], [5, 1, 0, 6]])


def kron_in_table_order(factors: dict[str, Tensor]) -> Tensor:
    """kron(A, G): the block for `table.flatten()`, rows of the table first."""
    A = torch.diag(factors["A"]) if factors["A"].dim() == 1 else factors["A"]
    return torch.kron(A, factors["G"])


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_tables_and_positions_under_a_linear_network_are_exact(padding_idx):
    model = Looked(padding_idx)
    factors = exact_factors(model, TOKENS)
    assert factors["table"]["A"].shape == (7,)  # counts, never a vocabulary squared
    for name, parameter in (("table", "table.weight"), ("places", "places"), ("shift", "shift")):
        block = dense.fisher_block(model, TOKENS, parameter)
        found = kron_in_table_order(factors[name])
        if name == "table" and padding_idx is not None:  # jacrev knows no padding; its row has no gradient
            row = padding_idx % 7
            own = torch.arange(21).view(7, 3)[row]
            block[own], block[:, own] = 0, 0
        assert dense.relative_error(found, block) <= dense.EXACT, name


class Indexed(nn.Module):
    """A table whose rows are picked without an embedding."""

    def __init__(self, call):
        super().__init__()
        self.table, self.head, self.call = nn.Parameter(dense.randn(7, 3)), nn.Linear(3, 2), call
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.call(self.table, tokens))


PICKS = {
    "table[tokens]": lambda table, tokens: table[tokens],
    "negative": lambda table, tokens: table[tokens - 7],
    "index_select": lambda table, tokens: table.index_select(0, tokens.flatten()).unflatten(0, tokens.shape),
    "torch.embedding": torch.embedding,
}


@pytest.mark.parametrize("pick", PICKS)
def test_rows_picked_by_hand_are_an_embedding(pick):
    model = Indexed(PICKS[pick])
    factors = exact_factors(model, TOKENS)
    found = kron_in_table_order(factors["table"])
    assert dense.relative_error(found, dense.fisher_block(model, TOKENS, "table")) <= dense.EXACT


def test_counts_are_those_of_the_tokens():
    factors = exact_factors(Looked(), TOKENS)["table"]
    dense.assert_exact(factors["A"], torch.bincount(TOKENS.flatten(), minlength=7).double() / 8)


def test_a_step_of_tables_and_positions_is_the_dense_one():
    """Factored damping for tables; a vector, one of whose factors is a number, is damped as a whole."""
    model = Looked()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = KFAC(model, lr=1.0, momentum=0.0, damping=0.1, kl_clip=None, likelihood="gaussian", fisher="exact",
                     compile=False, factor_fraction=1.0)  # fmt: skip
    model(TOKENS).sin().mean().backward()
    optimizer.step()
    factors = optimizer.factors()
    assert optimizer.coverage()["table.weight"] == "embedding" and optimizer.coverage()["shift"] == "position"
    for name, parameter in (("table", "table.weight"), ("places", "places")):
        A_inv, G_inv = dense.damped_inverses(torch.diag(factors[name]["A"]), factors[name]["G"], 0.1)
        p = model.get_parameter(parameter)
        wanted = A_inv @ p.grad.view(-1, 3) @ G_inv
        dense.assert_exact((before[parameter] - p.detach()).view(-1, 3), wanted)
    A, G = factors["shift"]["A"], factors["shift"]["G"]
    wanted = torch.linalg.solve(A * G + 0.1 * torch.eye(3, dtype=F64), model.shift.grad)
    dense.assert_exact(before["shift"] - model.shift.detach(), wanted)


def test_a_table_behind_a_nonlinearity_is_not_exact():
    class Bent(Looked):
        def forward(self, tokens):
            return self.head(torch.tanh(self.table(tokens) + self.places[:, : tokens.shape[1]]))

    model = Bent()
    found = kron_in_table_order(exact_factors(model, TOKENS)["table"])
    assert dense.relative_error(found, dense.fisher_block(model, TOKENS, "table.weight")) > dense.DIFFERENT


class Classes(nn.Module):
    """A class token in front, as a ViT has it, in three spellings."""

    def __init__(self, spelling: str):
        super().__init__()
        self.token = nn.Parameter(dense.randn(1, 1, 3))
        self.head = nn.Linear(3, 2)
        self.spelling = spelling
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        token = self.token.repeat(len(x), 1, 1) if self.spelling == "repeat" else self.token.expand(len(x), -1, -1)
        return self.head(torch.cat([token, x], 1) if self.spelling != "cat last" else torch.cat([x, token], 1))


@pytest.mark.parametrize("spelling", ["cat", "cat last", "repeat"])
def test_a_class_token_is_a_table_of_one_row(spelling):
    model, x = Classes(spelling), dense.randn(4, 5, 3)
    factors = exact_factors(model, x)
    found = kron_in_table_order(factors["token"])
    assert dense.relative_error(found, dense.fisher_block(model, x, "token")) <= dense.EXACT


# ---------------------------------------------------------------------------------------------------- scales and shifts

NORMS = {
    "layer": (lambda: nn.LayerNorm(4), (3, 5, 4)),
    "layer over two axes": (lambda: nn.LayerNorm((2, 4)), (3, 2, 4)),
    "layer without bias": (lambda: nn.LayerNorm(4, bias=False), (3, 5, 4)),
    "rms": (lambda: nn.RMSNorm(4), (3, 5, 4)),
    "group": (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
    "batch, one axis": (lambda: nn.BatchNorm1d(4), (6, 4)),
    "batch": (lambda: nn.BatchNorm2d(4), (3, 4, 2, 3)),
    "instance": (lambda: nn.InstanceNorm1d(4, affine=True), (3, 4, 5)),
}


class Scaled(nn.Module):
    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm, self.seed = norm, 3

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(x)).flatten(1)
        return y @ dense.randn(y.shape[1], 3, seed=self.seed)


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
@pytest.mark.parametrize("norm", ["full", "diagonal"])
@pytest.mark.parametrize("case", NORMS)
def test_scales_and_shifts_are_exact_behind_anything(case, norm, likelihood):
    """One example's gradients of all its positions are summed, so the block is the Fisher's own, nonlinear or not."""
    make, shape = NORMS[case]
    model, x = Scaled(make()).double().train(), dense.randn(*shape) * 2
    factors = exact_factors(model, x, norm=norm, likelihood=likelihood)["norm"]
    dense.assert_exact(factors["G"], torch.ones(1, 1, dtype=F64))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(chosen):
        for m in model.modules():
            if hasattr(m, "track_running_stats"):
                m.track_running_stats = False
        return dense.terms_last(torch.func.functional_call(model, chosen, (x,)))

    J = torch.cat([j.flatten(2) for j in torch.func.jacrev(outputs)(parameters).values()], 2)
    H = dense.output_fisher(likelihood, outputs(parameters))
    wanted = torch.einsum("lcp,lcd,ldq->pq", J, H, J) / len(H)
    dense.assert_exact(factors["A"], wanted if norm == "full" else wanted.diagonal())


def test_a_scale_by_hand_is_covered_as_a_norm_is():
    """As the RMSNorm of other libraries: weight * x, in either order, in place too, and of convolutions' channels; and
    those that hold the scale less one."""

    class Hand(nn.Module):
        def __init__(self, call, shape=(4,)):
            super().__init__()
            self.w, self.call = nn.Parameter(dense.randn(*shape, seed=2)), call

        def forward(self, x):
            y = torch.tanh(self.call(self.w, x * 1.0)).flatten(1)
            return y @ dense.randn(y.shape[1], 3, seed=3)

    calls = [lambda w, x: w * x, lambda w, x: x * w, lambda w, x: torch.mul(w, x), lambda w, x: x.mul_(w)]
    calls += [lambda w, x: x * (1.0 + w), lambda w, x: (w + 1) * x, lambda w, x: x * torch.add(w, 2, alpha=0.5)]
    calls += [lambda w, x: x * w.sub(1), lambda w, x: x * (1.0 + w).view(1, 4)]
    for call, shape in [*((call, (4,)) for call in calls), (calls[0], (1, 1, 4)), (calls[1], (5, 4))]:
        model, x = Hand(call, shape), dense.randn(3, 5, 4)
        optimizer = KFAC(model, likelihood="gaussian", fisher="exact", lr=0.0, compile=False, factor_fraction=1.0)
        model(x).sum().backward()
        optimizer.step()
        assert optimizer.coverage() == {"w": "scale"}
        dense.assert_exact(optimizer.factors()["w"]["A"], dense.fisher_block(model, x, "w"))


OTHERS = [
    lambda w: 1.0 - w, lambda w: w + w, lambda w: torch.add(1, w, alpha=2), lambda w: torch.add(w, w, alpha=2),
    lambda w: (1 + w).mul_(2), torch.exp,
]  # fmt: skip


@pytest.mark.parametrize("call", OTHERS)
def test_what_else_becomes_of_a_scale_before_its_use_is_not_covered(call):
    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(dense.randn(4, seed=2))

        def forward(self, x):
            return torch.tanh(x * call(self.w))

    model = Made()
    optimizer = KFAC(model, likelihood="gaussian", lr=0.0, compile=False)
    model(dense.randn(3, 4)).sum().backward()
    optimizer.step()
    assert optimizer.coverage() == {"w": "fallback"}


@pytest.mark.parametrize("call", [lambda w: 1 + w.double(), lambda w: (1 + w).double()])
def test_a_scale_that_is_cast_before_or_after_a_number_is_added_is_covered(call):
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(dense.randn(4, seed=2).float())

        def forward(self, x):
            return torch.tanh(x * call(self.w)) @ dense.randn(4, 3, seed=3)

    model, x = Cast(), dense.randn(6, 4)
    optimizer = KFAC(model, likelihood="gaussian", fisher="exact", lr=0.0, compile=False, factor_fraction=1.0)
    model(x).sum().backward()
    optimizer.step()
    assert optimizer.coverage() == {"w": "scale"}
    wanted = dense.fisher_block(copy.deepcopy(model).double(), x, "w")
    torch.testing.assert_close(optimizer.factors()["w"]["A"].double(), wanted, rtol=1e-5, atol=1e-6)


def test_rows_of_a_weight_plus_a_number_are_no_rows_of_it():
    """Nothing says any more which rows they were."""

    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(dense.randn(6, 4, seed=2))

        def forward(self, x):
            return torch.cat([F.linear(x, self.w[:2] + 1), F.linear(x, self.w[2:] + 1)], dim=1)

    model = Sliced()
    optimizer = KFAC(model, likelihood="gaussian", lr=0.0, compile=False)
    model(dense.randn(3, 4)).sum().backward()
    optimizer.step()
    assert optimizer.coverage() == {"w": "fallback"}


@pytest.mark.parametrize("norm", ["full", "diagonal"])
def test_a_step_of_a_norm_is_damped_as_a_whole(norm):
    """Where one factor is a number, nothing is split: V = (A + damping I)^-1 grad."""
    model, x = Scaled(nn.LayerNorm(4)).double(), dense.randn(6, 5, 4)
    before = torch.cat([p.detach().clone() for p in model.parameters()])
    optimizer = KFAC(model, lr=1.0, momentum=0.0, damping=0.1, kl_clip=None, likelihood="gaussian", fisher="exact",
                     norm=norm, compile=False, factor_fraction=1.0)  # fmt: skip
    model(x).sin().mean().backward()
    optimizer.step()
    A, grad = optimizer.factors()["norm"]["A"], torch.cat([p.grad for p in model.parameters()])
    A = torch.diag(A) if norm == "diagonal" else A
    V = torch.linalg.solve(A + 0.1 * torch.eye(8, dtype=F64), grad)
    dense.assert_exact(before - torch.cat([p.detach() for p in model.parameters()]), V)


# ---------------------------------------------------------------------------------------------------------- tied tables


class Tied(nn.Module):
    """A table that turns tokens into vectors, and vectors into scores of tokens."""

    def __init__(self, bias=False):
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.inner = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=bias)
        self.head.weight = self.table.weight
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.table(tokens))))


def apart(model: Tied) -> nn.Module:
    """The same network with two tables of the same numbers."""
    twin = Tied(model.head.bias is not None)
    twin.load_state_dict(model.state_dict())
    twin.head.weight = nn.Parameter(model.table.weight.detach().clone())
    return twin


@pytest.mark.parametrize("bias", [False, True])
def test_a_tied_table_has_one_product_that_bounds_the_sum_of_both(bias):
    """(G + C / pi) (x) (A + pi B) - G (x) A - C (x) B is positive semi-definite, with the pi of the smallest bound."""
    torch.manual_seed(0)
    model = Tied(bias)
    tokens = torch.tensor([[0, 1, 4], [2, 1, 1]])
    tied = exact_factors(model, tokens, likelihood="categorical")
    twin = exact_factors(apart(model), tokens, likelihood="categorical")
    assert "head" not in tied
    A, G = twin["head"]["A"], twin["head"]["G"]
    C, B = torch.diag(twin["table"]["A"]), twin["table"]["G"]
    B = F.pad(B, (0, 1, 0, 1)) if bias else B
    pi = (A.trace() * C.trace() / (G.trace() * B.trace())) ** 0.5
    dense.assert_exact(tied["table"]["A"], A + pi * B)
    dense.assert_exact(tied["table"]["G"], G + C / pi)
    added = torch.kron(tied["table"]["G"], tied["table"]["A"]) - torch.kron(G, A) - torch.kron(C, B)
    assert float(torch.linalg.eigvalsh(added).min()) > -1e-12


def test_a_step_of_a_tied_table_is_the_dense_one():
    torch.manual_seed(0)
    model, tokens = Tied(), torch.tensor([[0, 1, 4], [2, 1, 1]])
    before = model.table.weight.detach().clone()
    optimizer = KFAC(model, lr=1.0, momentum=0.0, damping=0.1, kl_clip=None, likelihood="categorical",
                     fisher="exact", compile=False, factor_fraction=1.0)  # fmt: skip
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    A_inv, G_inv = dense.damped_inverses(optimizer.factors()["table"]["A"], optimizer.factors()["table"]["G"], 0.1)
    dense.assert_exact(before - model.table.weight.detach(), G_inv @ model.table.weight.grad @ A_inv)


def test_a_wide_tied_table_is_diagonal_on_the_side_of_the_vocabulary():
    model = Tied()
    optimizer = KFAC(model, likelihood="categorical", lr=0.1, compile=False, max_factor_dim=4)
    assert optimizer.coverage()["table.weight"] == "tied (diagonal G)"
    for _ in range(3):
        optimizer.zero_grad()
        tokens = torch.tensor([[0, 1, 4], [2, 1, 1]])
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
    assert optimizer.coverage()["table.weight"] == "tied (diagonal G)"
    assert optimizer.state[model.table.weight]["G"].shape == (5,)


# ------------------------------------------------------------------------------------------------------ wide sides


WIDE = {
    4: "linear (A in 2 blocks)", 3: "linear (A in 3 blocks, G in 2 blocks)", 1: "linear (diagonal A, G in 4 blocks)"
}  # fmt: skip


@pytest.mark.parametrize(("limit", "name"), WIDE.items())
def test_a_wide_side_in_blocks(limit, name):
    """Blocks of the dense factor along its diagonal, and a step that multiplies with their inverses."""
    model, x = dense.random_model(nn.Linear(6, 4), nn.Tanh()), dense.randn(9, 6)
    full = exact_factors(model, x, likelihood="categorical")["0"]
    before = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach().clone()
    options = {"likelihood": "categorical", "rule": "kl", "fisher": "exact", "factor_fraction": 1.0, "kl_clip": None}
    optimizer = KFAC(model, lr=1.0, momentum=0.0, damping=0.1, max_factor_dim=limit, compile=False, **options)
    assert optimizer.coverage()["0.weight"] == name
    F.cross_entropy(model(x), torch.arange(9) % 4).backward()
    optimizer.step()
    assert optimizer.coverage()["0.weight"] == name
    found = optimizer.factors()["0"]
    A, G = (torch.diag(F) if F.dim() == 1 else F for F in (found["A"], found["G"]))
    for F_found, F_full, width in ((A, full["A"], 7), (G, full["G"], 4)):
        blocks = -(-width // limit)
        w = -(-width // blocks) if blocks <= 4 else 1
        same = torch.arange(width) // w
        dense.assert_exact(F_found, torch.where(same[:, None] == same, F_full, 0.0))
    A_inv, G_inv = dense.damped_inverses(A, G, 0.1)
    grad = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1)
    moved = before - torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
    dense.assert_exact(moved, G_inv @ grad @ A_inv)


# -------------------------------------------------------------------------------------------- a layer of the user's own


class Masked(nn.Module):
    """y = (x * mask) W^T + b by einsum, which no known function stands for."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.weight = nn.Parameter(dense.randn(d_out, d_in) / d_in**0.5)
        self.bias = nn.Parameter(dense.randn(d_out, seed=4))
        self.register_buffer("mask", torch.arange(d_in).double() % 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,oi->no", x * self.mask, self.weight) + self.bias


class MaskedBlock(LayerBlock):
    def a(self, module, inputs):
        return inputs[0] * module.mask

    def g(self, module, dy):
        return dy


class WrongBlock(MaskedBlock):
    def a(self, module, inputs):
        return inputs[0]


def test_a_block_of_the_users_own_is_exact_where_a_linear_layer_is():
    model, x = (
        dense.random_model(nn.Linear(5, 4)).append(Masked(4, 3)).append(nn.Linear(3, 2).double()),
        dense.randn(6, 5),
    )
    MaskedBlock().check(model[1], dense.randn(6, 4))
    factors = exact_factors(model, x, blocks={Masked: MaskedBlock()})
    block = dense.fisher_block(model, x, "1.weight", "1.bias")
    assert dense.relative_error(dense.kron(factors["1"]), block) <= dense.EXACT
    optimizer = KFAC(model, likelihood="gaussian", blocks={Masked: MaskedBlock()})
    assert optimizer.coverage()["1.weight"] == optimizer.coverage()["1.bias"] == "custom"
    without = exact_factors(model, x)
    assert "1" not in without and {"0", "2"} <= set(without)


def test_a_wrong_block_is_told_so():
    with pytest.raises(ValueError, match=r"the rows' gradient of weight differs from autograd's by"):
        WrongBlock().check(Masked(4, 3), dense.randn(6, 4))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([Masked], "blocks must be a dictionary from types of modules to LayerBlocks"),
        ({"Masked": MaskedBlock()}, "blocks must have types of modules for keys"),
        ({Masked: MaskedBlock}, r"blocks\[Masked\] must be a LayerBlock"),
    ],
)
def test_what_is_no_block_is_refused(blocks, message):
    with pytest.raises(ValueError, match=message):
        KFAC(nn.Sequential(Masked(4, 3)), likelihood="gaussian", blocks=blocks)
