"""What structures hold: states that go through a file, bytes, and addresses that stay."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import dense
import pytest
import torch
from definitions import CHAINS
from laws import ALL, DAMPING, MEMBERS, bench_of, cases, given
from small import closure_step, data, mlp, train_step
from stacks import ALONE, FORMS, Bench, held_bytes, in_use, rows_of, sample_of, stack_of
from torch import Tensor, nn

from kfac_triton import KFAC
from kfac_triton.operations.layout import DENSE
from kfac_triton.structures import buffered
from kfac_triton.structures.buffered import BufferedRows
from kfac_triton.structures.factor import Factor
from kfac_triton.structures.registry import structure_of


def saved(bench: Bench) -> list[dict[str, Any]]:
    """The states, by way of a file."""
    file = io.BytesIO()
    torch.save([bench.state(i) for i in range(len(bench.stack.layers))], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("updates", [1, 2, 4])
@ALL
def test_a_state_goes_through_a_file_to_the_bit(approximation, form, updates, matrix_memory):
    """Tensors, products, and what the next update and the next refresh make of both."""
    bench, twin = bench_of(approximation, form), bench_of(approximation, form)
    for step in range(updates):
        bench.update_(given(bench, step)[1], damping=DAMPING)
        if step % 2:
            bench.refresh_(DAMPING)
    twin.restore(saved(bench))
    grad = dense.randn(*bench.memory.V.matrices[0].shape)
    for again in range(3):
        for own, other in zip(saved(bench), saved(twin), strict=True):
            torch.testing.assert_close(in_use(other), in_use(own), rtol=0, atol=0)
        assert twin.structure.ready == bench.structure.ready
        if all(bench.structure.ready):
            assert torch.equal(twin.apply(grad), bench.apply(grad))
        for one in (bench, twin):
            one.update_(given(bench, 6 + again)[1], damping=DAMPING)
            if again:
                one.refresh_(DAMPING)


def test_a_layer_that_never_had_an_update_stays_without_a_state():
    for approximation, form in cases():
        bench, twin = bench_of(approximation, form), bench_of(approximation, form)
        _, samples = given(bench, 0)
        bench.update_([samples[0], None, samples[2]], damping=DAMPING)
        bench.refresh_(DAMPING)
        twin.restore(saved(bench))
        assert twin.structure.ready == bench.structure.ready == [True, False, True]


def test_rows_that_wait_may_be_differently_many(monkeypatch):
    """Layers come from stacks of their own, as where one of several equal layers was frozen before."""
    monkeypatch.setattr(buffered, "NARROWEST", 1)
    benches = [bench_of("kronecker", "linear", 1) for _ in range(3)]
    for i, bench in enumerate(benches):
        for step in range(i + 1):
            bench.update_([sample_of(bench.stack.layers[0], rows_of(bench.stack.layers[0], step))], damping=DAMPING[:1])
    states = [saved(bench)[0] for bench in benches]
    assert [state["A_waiting"] for state in states] == [6, 12, 18]
    joined = bench_of("kronecker", "linear")
    joined.restore(states)
    for i, bench in enumerate(benches):
        for F, other in zip(joined.structure.factors(i, 0.1), bench.structure.factors(0, 0.1), strict=True):
            dense.assert_exact(F, other)


# -------------------------------------------------------------------------------------------------------------- memory

NUMBERS = {"kept", "means", "eigen_damping", "spectrum_updates", "time_steps"}  # one or two a layer
PASSING = {"_rows", "_rooms", "_unmeasured", "stack", "ranks", "values", "inverse", "divisor"}  # or views of others


def tensors_in(thing: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that an object holds, with the name of what holds it."""
    fields = thing.items() if isinstance(thing, dict) else vars(thing).items()
    for name, value in fields:
        if name in NUMBERS | PASSING:
            continue
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, list):
            yield from ((name, t) for t in value if isinstance(t, Tensor))
        elif isinstance(value, (dict, Factor, BufferedRows)):
            yield from tensors_in(value)


@ALL
def test_bytes_are_those_of_the_tensors_that_are_held(approximation, form, matrix_memory):
    """With the zeros around matrices; and before there is memory the same, with the most rows that may wait."""
    bench = bench_of(approximation, form)
    given_now = [sample_of(layer, rows_of(layer, i)) for i, layer in enumerate(bench.stack.layers)]
    bench.update_(given_now, damping=DAMPING)
    bench.refresh_(DAMPING)
    told = bench.structure.nbytes()
    assert sum(told.values()) == held_bytes(t for _, t in tensors_in(bench.structure))
    temporal = approximation if approximation in CHAINS else "independent"
    name = "kronecker" if approximation in CHAINS else approximation
    imagined = structure_of(stack_of(form, MEMBERS, imagined=True), ALONE, name, temporal)
    assert all(t.is_meta for _, t in tensors_in(imagined))
    most = imagined.nbytes()
    if form == "scale":  # whose rows could wait, but have all of their columns already
        most["rows"] = 0
    assert most == told
    assert (told["rows"] > 0) == (matrix_memory == "rows wait" and may_wait(approximation, form))


def may_wait(approximation: str, form: str) -> bool:
    layout = FORMS[form][0]
    waits = layout.A == layout.G == DENSE and layout.groups == 1
    return waits and approximation != "inverse_free" and form != "scale"


# ----------------------------------------------------------------------------------------------------------- addresses

RUNS: dict[str, dict[str, Any]] = {
    "plain": {"momentum": 0.0},
    "momentum": {},
    "intervals": {"factor_interval": 2, "inverse_interval": 3},
    "eigen": {"approximation": "eigen"},
    "eigen, intervals": {"approximation": "eigen", "factor_interval": 2, "inverse_interval": 3},
    "inverse_free": {"approximation": "inverse_free"},
    "tridiagonal": {"approximation": "tridiagonal"},
    "adaptive damping": {"damping": "adaptive"},
    "all adaptive": {"lr": "adaptive", "momentum": "adaptive", "damping": "adaptive"},
    "adaptive, eigen": {"damping": "adaptive", "approximation": "eigen"},
    "without a bound": {"kl_clip": None},
    "groups": {},
    "blocks": {"max_factor_dim": 4},
    "empirical": {"fisher": "empirical"},
}


class Pieces(nn.Module):
    """A grouped transposed convolution, whose weight is no view of its matrix, and a parameter without a block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale, self.head = nn.ConvTranspose1d(2, 4, 2, groups=2), nn.Parameter(torch.ones(16)), mlp(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x.unflatten(1, (2, 3)))).flatten(1) * self.scale.exp())


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("make", [mlp, Pieces])
def test_addresses_stay_over_thirty_steps(name, make, monkeypatch):
    """Of every tensor in the state, and of the joint matrices: what a recorded step writes to must stay there."""
    monkeypatch.setattr(buffered, "NARROWEST", 1)
    options = RUNS[name]
    if make is Pieces and options.get("approximation") == "tridiagonal":
        pytest.skip("takes chains of linear layers alone")
    torch.manual_seed(0)
    model = make()
    weights = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": weights}, {"params": [p for p in model.parameters() if p.dim() < 2], "lr": 0.02}]
    optimizer = KFAC(model, groups if name == "groups" else None, likelihood="categorical", compile=False, **options)
    x, y = data()
    seen: dict[Any, int] = {}
    for step in range(30):
        take = closure_step if "adaptive" in options.values() else train_step
        take(optimizer, model, x[step % 3 :], y[step % 3 :])
        for key, t in tensors_of(optimizer):
            assert seen.setdefault(key, t.data_ptr()) == t.data_ptr(), key
    assert {"J", "V"} <= {key[0] for key in seen} and len(seen) > 12
    assert all(torch.isfinite(p).all() for p in model.parameters())


def tensors_of(optimizer: KFAC) -> Iterator[tuple[Any, Tensor]]:
    for p, held in optimizer.state.items():
        yield from (((id(p), name), t) for name, t in held.items() if isinstance(t, Tensor) and t.numel())
    memory = optimizer._runner.memory
    for name, matrices in (("J", memory.J), ("V", memory.V), ("M", memory.M)):
        yield from (((name, i), flat) for i, flat in enumerate(matrices.flats if matrices else ()))
