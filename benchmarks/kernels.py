"""The kernels on a device: each checked there against float64, then timed against torch's own libraries.

Ours and the library's launches take turns, on the same numbers; a line has both medians and what a roofline of the
device allows. On a CPU, where no kernel runs, the references stand in for them, and the report says so.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from kfac_triton import ops
from kfac_triton.tuning import gpus
from kfac_triton.tuning.environment import describe
from kfac_triton.tuning.gpus import GPU
from kfac_triton.tuning.store import write_json, write_text
from kfac_triton.tuning.tiles import seconds_of

ROUNDS, WARM_UP = 30, 5
TIMES_LIBRARY = 4.0  # our error may be that many times the library's own, against float64,
LEAST_ERROR = 2e-6  # or this, relative to the largest entry
ROUNDED = 2.0**-8  # a bfloat16 parameter is rounded once
SMALL = 8  # a CPU, which shows that the command works, takes sizes divided by this

Timing = tuple[float, float]  # seconds, ours and the library's


@dataclass(frozen=True)
class Trial:
    """One comparison, its tensors made. `operations` and `bytes` are the least that the result takes.

    `check` runs both once on fresh outputs: the errors of ours and of the library, relative to the largest entry.
    """

    ours: Callable[[], Any]
    library: Callable[[], Any]
    check: Callable[[], tuple[float, float]]
    operations: float
    bytes: float
    kind: str


@dataclass(frozen=True)
class Case:
    """A trial by name; `against` says what the library does."""

    kernel: str
    label: str
    against: str
    make: Callable[[torch.device, int], Trial]


@dataclass(frozen=True)
class Outcome:
    """What came out; times in seconds, None where they were not taken. `roofline`: None without a described GPU."""

    kernel: str
    label: str
    against: str
    error: float
    library_error: float
    right: bool
    ours: float | None
    library: float | None
    roofline: float | None
    fault: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the library."""
        return None if self.ours is None or self.library is None else self.library / self.ours


def cases() -> list[Case]:
    """What an optimizer launches, at sizes of common networks."""
    found = [
        Case("syrk", f"X ({n}, {d}) {dtype}", "baddbmm of the whole product", syrk_case(n, d, dtype))
        for n, d in ((4096, 512), (8192, 1024), (32768, 128), (8192, 4096))
        for dtype in ("float32", "bfloat16")
    ]
    found += [Case("syrk", "24 X (8192, 64) float32", "baddbmm of each", syrk_case(8192, 64, "float32", 24))]
    found += [
        Case("conv_syrk", f"image ({N}, {C}, {side}, {side}), 3 x 3, {dtype}", "unfold, then baddbmm",
             conv_case(N, C, side, dtype))
        for N, C, side in ((64, 64, 32), (64, 256, 8))
        for dtype in ("float32", "bfloat16")
    ]  # fmt: skip
    found += [
        Case("kron_matmul", f"{count} V ({rows}, {columns})", "two matmul for each", kron_case(count, rows, columns))
        for count, rows, columns in ((16, 128, 128), (16, 256, 288), (2, 1024, 1024))
    ]
    found += [Case("eigen_scale", "16 V (256, 288)", "four matmul and a division", eigen_case(16, 256, 288))]
    found += [
        Case(
            "fused_update",
            f"{count} W ({rows}, {columns}) {dtype}",
            "foreach operations",
            update_case(count, rows, columns, dtype),
        )
        for count, rows, columns in ((24, 1024, 1024),)
        for dtype in ("float32", "bfloat16")
    ]
    found += [
        Case("newton_schulz", f"{count} M ({d}, {d})", "Cholesky and its inverse", newton_case(count, d))
        for count, d in ((16, 256), (1, 1024))
    ]
    return found


def run(device: torch.device, seconds: float, wanted: Sequence[str] = ()) -> Iterator[Outcome]:
    """The outcome of each case; when `seconds` are over, the rest is still checked, but not timed."""
    gpu = gpus.find(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    deadline = time.monotonic() + seconds
    for case in cases():
        if not wanted or case.kernel in wanted:
            yield outcome_of(case, device, gpu, deadline)


def outcome_of(case: Case, device: torch.device, gpu: GPU | None, deadline: float) -> Outcome:
    """Checks a case, and times it while there is time. A case that raises is a fault, and the others go on."""
    own = (case.kernel, case.label, case.against)
    try:
        trial = case.make(device, 1 if device.type == "cuda" else SMALL)
        error, library_error = trial.check()
        right = error <= max(TIMES_LIBRARY * library_error, LEAST_ERROR)
        ours, library = timed(trial, device, deadline)
    except (RuntimeError, ValueError, AssertionError) as fault:
        text = f"{type(fault).__name__}: {str(fault).strip().splitlines()[0] if str(fault).strip() else ''}"
        return Outcome(*own, math.nan, math.nan, False, None, None, None, text)
    return Outcome(*own, error, library_error, right, ours, library, roofline_of(trial, gpu))


def timed(trial: Trial, device: torch.device, deadline: float) -> tuple[float, float] | tuple[None, None]:
    """Median seconds of ours and the library's, interleaved; none after the deadline."""
    if time.monotonic() > deadline:
        return None, None
    for _ in range(WARM_UP):
        trial.ours()
        trial.library()
    found: list[Timing] = []
    while len(found) < ROUNDS and (len(found) < 3 or time.monotonic() < deadline):
        found.append((seconds_of(trial.ours, device), seconds_of(trial.library, device)))
    return statistics.median(a for a, _ in found), statistics.median(b for _, b in found)


def roofline_of(trial: Trial, gpu: GPU | None) -> float | None:
    """The least seconds on the device: its matrix units at their peak, or its memory."""
    if gpu is None:
        return None
    return max(trial.operations / gpu.peaks[trial.kind], trial.bytes / gpu.bandwidth)


def verdict(outcome: Outcome, on_gpu: bool) -> str:
    """One line for a person."""
    if outcome.fault:
        return f"FAILED: {outcome.fault}"
    if not outcome.right:
        return f"WRONG: an error of {outcome.error:.1e}, the library's is {outcome.library_error:.1e}"
    right = f"right ({outcome.error:.0e})"
    if outcome.ratio is None:
        return f"{right}, not timed: the time was over"
    if not on_gpu:
        return f"{right}; the reference is {outcome.ratio:.2f} times as fast, on this CPU at small sizes"
    share = "" if not outcome.roofline else f", {outcome.roofline / (outcome.ours or math.inf):.0%} of the roofline"
    word = "faster" if outcome.ratio > 1.02 else "slower" if outcome.ratio < 0.98 else "as fast"
    return f"{right}, {outcome.ratio:.2f} times the library ({word}){share}"


def summary(outcomes: Sequence[Outcome], device: torch.device) -> list[str]:
    """What the whole came to, a line for each kernel."""
    lines = []
    for kernel in dict.fromkeys(outcome.kernel for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.kernel == kernel]
        wrong = sum(not outcome.right for outcome in own)
        ratios = [outcome.ratio for outcome in own if outcome.ratio is not None]
        correct = f"right in all {len(own)}" if not wrong else f"WRONG or failed in {wrong} of {len(own)}"
        speed = f", {min(ratios):.2f} to {max(ratios):.2f} times the library's speed" if ratios else ", not timed"
        lines.append(f"{kernel}: {correct}{speed if device.type == 'cuda' else ''}")
    if device.type != "cuda":
        lines.append("No GPU was measured: these are the references, on the CPU, at sizes divided by 8.")
    return lines


def write(folder: Path, outcomes: Sequence[Outcome], device: torch.device) -> None:
    """kernels.json and kernels.html."""
    rows = [
        {**asdict(outcome), "ratio": outcome.ratio, "verdict": verdict(outcome, device.type == "cuda")}
        for outcome in outcomes
    ]
    environment = describe(device)
    held = {"environment": environment, "measured_a_gpu": device.type == "cuda", "outcomes": rows}
    write_json(folder / "kernels.json", held)
    templates = Environment(
        loader=PackageLoader("kfac_triton.benchmarks", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = templates.get_template("kernels.html.j2").render(
        rows=rows, environment=environment, lines=summary(outcomes, device), microseconds=microseconds
    )
    write_text(folder / "kernels.html", page)


def microseconds(seconds: float | None) -> str:
    """For a table; a dash for what was not measured."""
    return "–" if seconds is None else f"{seconds * 1e6:.1f}"


# ------------------------------------------------------------------------------------------------------------ the cases


def syrk_case(n: int, d: int, dtype: str, count: int = 1) -> Callable[[torch.device, int], Trial]:
    """F <- 0.9 F + 0.1 X^T X of one matrix, or of a list."""

    def make(device: torch.device, divisor: int) -> Trial:
        rows, width = max(n // divisor, 1), max(d // divisor, 1)
        X = [random(device, rows, width).to(getattr(torch, dtype)) for _ in range(count)]
        F = [torch.zeros(width, width, device=device) for _ in X]
        other = [f.clone() for f in F]
        a, b = scalar(device, 0.1), scalar(device, 0.9)

        def library() -> None:
            for f, x in zip(other, X, strict=True):
                f.mul_(0.9).add_((x.mT @ x).float(), alpha=0.1)

        def check() -> tuple[float, float]:
            for tensors in (F, other):
                torch._foreach_zero_(tensors)
            ops.syrk_(F, X, [a] * count, [b] * count)
            library()
            wanted = [0.1 * x.double().mT @ x.double() for x in X]
            return worst(F, wanted), worst(other, wanted)

        operations = count * rows * width * (width + 1.0)
        moved = count * (rows * width * X[0].element_size() + 6.0 * width * width)
        kind = "bf16" if dtype != "float32" else "tf32"
        ours = partial(ops.syrk_, F, X, [a] * count, [b] * count)
        return Trial(ours, library, check, operations, moved, kind)

    return make


def conv_case(N: int, C: int, side: int, dtype: str) -> Callable[[torch.device, int], Trial]:
    """The patch factor of a 3 x 3 convolution that keeps the image's size; channels last, as cuDNN likes them."""

    def make(device: torch.device, divisor: int) -> Trial:
        count, channels = max(N // divisor, 1), max(C // divisor, 1)
        image = random(device, count, channels, side, side).to(getattr(torch, dtype))
        image = image.contiguous(memory_format=torch.channels_last)
        d, n = 9 * channels, count * side * side
        F = torch.zeros(d, d, device=device)
        other, a, b = F.clone(), scalar(device, 0.1), scalar(device, 0.9)
        P = ops.Patches(image, (3, 3, 1, 1, 1, 1, 1, 1, 1, 1), 1)

        def library() -> None:
            rows = torch.nn.functional.unfold(image, 3, padding=1).transpose(1, 2).flatten(0, 1)
            other.mul_(0.9).add_((rows.mT @ rows).float(), alpha=0.1)

        def check() -> tuple[float, float]:
            F.zero_()
            other.zero_()
            ops.conv_syrk_([F], [P], [a], [b])
            library()
            rows = torch.nn.functional.unfold(image.double(), 3, padding=1).transpose(1, 2).flatten(0, 1)
            wanted = 0.1 * rows.mT @ rows
            order = torch.arange(d, device=device).unflatten(0, (channels, 9)).t().flatten()
            return worst([F], [wanted[order][:, order]]), worst([other], [wanted])

        kind = "bf16" if dtype != "float32" else "tf32"
        ours = partial(ops.conv_syrk_, [F], [P], [a], [b])
        return Trial(ours, library, check, n * d * (d + 1.0), float(image.nbytes + 6 * d * d), kind)

    return make


def kron_case(count: int, rows: int, columns: int) -> Callable[[torch.device, int], Trial]:
    """G_inv V A_inv of a list of layers, with <V, grad> at the end."""

    def make(device: torch.device, divisor: int) -> Trial:
        M, N = max(rows // divisor, 1), max(columns // divisor, 1)
        G, V, A = ([random(device, *size) for _ in range(count)] for size in ((M, M), (M, N), (N, N)))
        out, other = ([torch.empty_like(v) for v in V] for _ in range(2))
        dots = torch.zeros(count, 2, device=device)

        def ours() -> None:
            ops.kron_matmul_(out, G, V, A, dots=dots)

        def library() -> None:
            for o, g, v, a in zip(other, G, V, A, strict=True):
                torch.matmul(g, v @ a, out=o)
                (o * v).sum()

        def check() -> tuple[float, float]:
            ours()
            library()
            wanted = [g.double() @ v.double() @ a.double() for g, v, a in zip(G, V, A, strict=True)]
            sums = torch.stack([(w * v).sum() for w, v in zip(wanted, V, strict=True)])
            error = worst(out, wanted)
            if worst([dots.sum(1)], [sums]) > 1e-4:
                error = math.inf
            return error, worst(other, wanted)

        operations, moved = 2.0 * M * N * (M + N), 4.0 * (M * M + N * N + 4 * M * N)
        return Trial(ours, library, check, count * operations, count * moved, "tf32")

    return make


def eigen_case(count: int, rows: int, columns: int) -> Callable[[torch.device, int], Trial]:
    """The same in eigenbases."""

    def make(device: torch.device, divisor: int) -> Trial:
        M, N = max(rows // divisor, 1), max(columns // divisor, 1)
        Q_G, Q_A = ([torch.linalg.qr(random(device, d, d))[0] for _ in range(count)] for d in (M, N))
        S = [random(device, M, N).abs() for _ in range(count)]
        V = [random(device, M, N) for _ in range(count)]
        out, other = ([torch.empty_like(v) for v in V] for _ in range(2))
        damping = [scalar(device, 0.1)] * count
        lists = (Q_G, V, Q_A, S)

        def by_hand(entries: Sequence[Tensor]) -> Tensor:
            g, v, a, s = entries
            return g @ ((g.mT @ v @ a) / (s + 0.1)) @ a.mT

        def library() -> None:
            for o, *entries in zip(other, *lists, strict=True):
                o.copy_(by_hand(entries))

        def check() -> tuple[float, float]:
            ops.eigen_scale_(out, *lists, damping)
            library()
            wanted = [by_hand([t.double() for t in entries]) for entries in zip(*lists, strict=True)]
            return worst(out, wanted), worst(other, wanted)

        operations, moved = 4.0 * M * N * (M + N), 4.0 * (2 * M * M + 2 * N * N + 7 * M * N)
        ours = partial(ops.eigen_scale_, out, *lists, damping)
        return Trial(ours, library, check, count * operations, count * moved, "tf32")

    return make


def update_case(count: int, rows: int, columns: int, dtype: str) -> Callable[[torch.device, int], Trial]:
    """Momentum and the parameters' write over a list of tensors."""

    def make(device: torch.device, divisor: int) -> Trial:
        size = (max(rows // divisor, 1), 1, max(columns // divisor, 1))
        W, buffer, V = ([random(device, *size) for _ in range(count)] for _ in range(3))
        W, buffer = ([t.to(getattr(torch, dtype)) for t in tensors] for tensors in (W, buffer))
        other, other_buffer = ([t.clone() for t in tensors] for tensors in (W, buffer))
        numbers = [[scalar(device, value)] * count for value in (0.5, 0.1, 0.9, 0.0)]

        def library() -> None:
            torch._foreach_mul_(other_buffer, 0.9)
            torch._foreach_add_(other_buffer, torch._foreach_mul(V, 0.5))
            torch._foreach_add_(other, other_buffer, alpha=-0.1)

        def check() -> tuple[float, float]:
            wanted = [w.double() - 0.1 * (0.9 * b.double() + 0.5 * v) for w, b, v in zip(W, buffer, V, strict=True)]
            ops.fused_update_(W, buffer, V, *numbers)
            library()
            allowed = ROUNDED if dtype != "float32" else 0.0
            return worst(W, wanted), max(worst(other, wanted), allowed)

        elements = count * math.prod(size)
        ours = partial(ops.fused_update_, W, buffer, V, *numbers)
        return Trial(ours, library, check, 6.0 * elements, elements * (4.0 * W[0].element_size() + 4), "fp32")

    return make


def newton_case(count: int, d: int) -> Callable[[torch.device, int], Trial]:
    """Inverses from those of matrices that differ by a twentieth, as after some steps of training."""

    def make(device: torch.device, divisor: int) -> Trial:
        side = max(d // divisor, 1)
        samples, eye = random(device, 2 * side, side), torch.eye(side, device=device)
        M = [samples.mT @ samples / len(samples) + (0.1 + 0.01 * i) * eye for i in range(count)]
        before = [torch.linalg.inv(m + 0.05 * m.diagonal().mean() * eye) for m in M]
        before = [((x + x.mT) / 2).contiguous() for x in before]
        X = [x.clone() for x in before]
        other = [torch.empty_like(m) for m in M]
        residual = torch.zeros(count, device=device)

        def ours() -> None:
            torch._foreach_copy_(X, before)
            ops.newton_schulz_(X, M, residual, backend="triton" if device.type == "cuda" else None)

        def library() -> None:
            for o, m in zip(other, M, strict=True):
                o.copy_(torch.cholesky_inverse(torch.linalg.cholesky_ex(m)[0]))

        def check() -> tuple[float, float]:
            ours()
            library()
            wanted = [torch.linalg.inv(m.double()) for m in M]
            return worst(X, wanted), worst(other, wanted)

        return Trial(ours, library, check, count * float(side) ** 3, count * 8.0 * side * side, "tf32")

    return make


def random(device: torch.device, *size: int) -> Tensor:
    """Normal numbers, the same for each device."""
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(*size, generator=generator).to(device)


def scalar(device: torch.device, value: float) -> Tensor:
    """0-d, float32."""
    return torch.full((), value, device=device)


def worst(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest error, relative to each matrix's largest entry; inf where something is not finite."""
    errors = [
        float((f.double() - w).abs().max() / w.abs().max().clamp(min=1e-30)) for f, w in zip(found, wanted, strict=True)
    ]
    return max((error if math.isfinite(error) else math.inf for error in errors), default=0.0)
