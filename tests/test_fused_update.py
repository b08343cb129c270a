"""fused_update_ against its equations in float64: the reference and the Triton kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_triton import ops
from kfac_triton.kernels import fused_update
from kfac_triton.kernels.fused_update import Entry

# One rounding of W and of buf: a unit in the last place of the largest entry (the interpreter truncates to bfloat16).
TOLERANCE = {torch.float32: 3e-7, torch.float64: 1e-15, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = [(5, 1, 7), (1, 1, 1), (64, 1, 48), (3, 9, 16), (700, 1, 3)]
NUMBERS = {"nu": 0.5, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def scalars(device="cpu", **changed) -> list[Tensor]:
    return [torch.tensor(value, device=device) for value in (NUMBERS | changed).values()]


def make(shape, dtype=torch.float32, buffered=True, device="cpu", **changed) -> Entry:
    torch.manual_seed(0)
    W, buffer = torch.randn(shape).to(device, dtype), torch.randn(shape).to(device, dtype)
    return Entry(W, buffer if buffered else None, torch.randn(shape, device=device), *scalars(device, **changed))


def expected(entry: Entry) -> tuple[Tensor, Tensor | None]:
    W, buffer, V, nu, lr, momentum, weight_decay = (None if t is None else t.double() for t in entry)
    buffer = nu * V if buffer is None else momentum * buffer + nu * V
    return W - lr * (buffer + weight_decay * W), buffer


def check(entry: Entry, wanted: tuple[Tensor, Tensor | None]) -> None:
    tolerance = TOLERANCE[entry.W.dtype]
    for found, E in zip(entry[:2], wanted, strict=True):
        if found is not None:
            assert (found.double() - E).abs().max() <= tolerance * E.abs().max()


@pytest.fixture(params=["reference", "triton"])
def apply(request):
    if request.param == "triton":
        request.getfixturevalue("interpreter")
        return lambda entry: fused_update.launch([entry], block=256)
    return fused_update.reference


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_equations(apply, shape, buffered):
    entry = make(shape, buffered=buffered)
    wanted = expected(entry)
    apply(entry)
    check(entry, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(kernel_device, dtype):
    entry = make((40, 1, 33), dtype, device=kernel_device)
    wanted = expected(entry)
    fused_update.launch([entry])
    check(entry, wanted)


def test_float64_goes_to_torch(interpreter):
    entry = make((4, 1, 3), torch.float64)
    wanted = expected(entry)
    ops.fused_update_(*([t] for t in entry), backend="triton")
    check(entry, wanted)


STRIDED = {
    "a convolution's weight": lambda e: e._replace(W=e.W.mT.contiguous().mT, buffer=e.buffer.mT.contiguous().mT),
    "V in wider rows": lambda e: e._replace(V=torch.cat([e.V, e.V], -1)[..., :16]),
    "a transposed weight": lambda e: e._replace(W=e.W.permute(2, 1, 0).contiguous().permute(2, 1, 0)),
    "an odd address": lambda e: e._replace(W=torch.cat([e.W.new_zeros(1), e.W.flatten()])[1:].view(e.W.shape)),
}


@pytest.mark.parametrize("memory", STRIDED)
def test_any_strides(apply, memory):
    entry = STRIDED[memory](make((8, 9, 16)))
    wanted = expected(entry)
    apply(entry)
    check(entry, wanted)


def test_nothing_beyond_the_arguments_is_written(apply):
    around = torch.full((40, 5, 50), torch.nan)
    entry = make((20, 3, 33))
    inside = around[9:29, 1:4, 7:40]
    inside.copy_(entry.W)
    entry = entry._replace(W=inside)
    wanted = expected(entry)
    apply(entry)
    check(entry, wanted)
    inside.fill_(torch.nan)
    assert around.isnan().all()


def test_no_address_beyond_the_arguments(strays):
    around = torch.zeros(40, 5, 50)
    entry = make((20, 3, 33))._replace(W=around[9:29, 1:4, 7:40])
    fused_update.launch([entry], block=256)
    assert strays(around, entry.W) == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_32_bits(interpreter, axis):
    """W spread over memory that is reserved and not used; an offset that wraps around lands before it, still inside."""
    half, stride = 2**31, 2**30 + 4
    try:
        memory = torch.empty(2 * half + 64, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("the machine does not reserve that much memory")
    strides = [1, 1, 1]
    strides[axis] = stride
    shape = [1, 1, 1]
    shape[axis] = 3
    W = memory.as_strided(shape, strides, half)
    entry = make(shape, buffered=False)._replace(W=W.copy_(torch.tensor([1.0, 2.0, 3.0]).view(shape)))
    wanted = expected(entry)
    fused_update.launch([entry], block=16)
    check(entry, wanted)


def test_a_skipped_step_moves_nothing(apply):
    """lr = 0 and momentum = 1 with V = 0, as the step has it where a gradient is not finite."""
    entry = make((20, 1, 33), lr=0.0, momentum=1.0)._replace(V=torch.zeros(20, 1, 33))
    before = entry.W.clone(), entry.buffer.clone()
    apply(entry)
    assert torch.equal(entry.W, before[0]) and torch.equal(entry.buffer, before[1])


def test_many_tensors_in_one_call_each_with_numbers_of_its_own(kernel_device, monkeypatch):
    launches = []
    launch = fused_update.launch
    monkeypatch.setattr(fused_update, "launch", lambda bucket: (launches.append(len(bucket)), launch(bucket)))
    entries = [make((20, 1, 33), device=kernel_device, lr=0.1 * i, nu=0.2 * i) for i in range(3)]
    entries += [make((5, 1, 7), device=kernel_device), make((20, 1, 33), torch.bfloat16, device=kernel_device)]
    wanted = [expected(entry) for entry in entries]
    ops.fused_update_(*(list(column) for column in zip(*entries, strict=True)), backend="triton")
    for entry, E in zip(entries, wanted, strict=True):
        check(entry, E)
    assert launches == [3, 1, 1]


def test_program_order_does_not_matter(program_order):
    entry = make((20, 1, 33))
    wanted = expected(entry)
    fused_update.launch([entry], block=256)
    check(entry, wanted)


def test_an_empty_tensor(apply):
    entry = make((0, 1, 3))
    apply(entry)
    assert entry[0].shape == (0, 1, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
def test_a_graph_replays_with_the_numbers_of_the_day():
    entry = make((64, 1, 48), device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fused_update.launch([make((64, 1, 48), device="cuda")])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.fused_update_(*([t] for t in entry), backend="triton")
    for lr in (0.1, 0.7):
        entry.lr.fill_(lr)
        wanted = expected(entry)
        graph.replay()
        check(entry, wanted)
