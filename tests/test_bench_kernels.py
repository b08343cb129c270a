"""kfac-bench kernels: what it says of right and wrong kernels, of a device, and of a CPU."""

from __future__ import annotations

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch

from kfac_triton.benchmarks import cli
from kfac_triton.benchmarks import kernels as bench
from kfac_triton.benchmarks.kernels import Case, Outcome, Trial
from kfac_triton.tuning import gpus, tiles

CPU = torch.device("cpu")


def trial(error: float = 1e-7, library_error: float = 1e-7, ours=lambda: None, library=lambda: None) -> Trial:
    return Trial(ours, library, lambda: (error, library_error), 1e9, 1e6, "tf32")


def outcome(made: Trial, deadline: float = math.inf) -> Outcome:
    case = Case("syrk", "label", "library", lambda device, divisor: made)
    return bench.outcome_of(case, CPU, gpus.find("H100"), deadline)


def test_every_operator_has_a_case():
    assert {case.kernel for case in bench.cases()} == {
        "syrk", "conv_syrk", "kron_matmul", "eigen_scale", "fused_update", "newton_schulz",
    }  # fmt: skip


def test_right_and_wrong():
    assert outcome(trial(3e-6, 1e-6)).right and not outcome(trial(5e-6, 1e-6)).right
    assert outcome(trial(1e-6, 0.0)).right, "float32's own rounding is no fault"
    assert not outcome(trial(math.inf)).right
    assert bench.verdict(outcome(trial(5e-6, 1e-6)), True) == "WRONG: an error of 5.0e-06, the library's is 1.0e-06"


def test_a_kernel_that_fails_is_a_verdict_and_not_the_end():
    def fail() -> None:
        raise RuntimeError("no image for this device\nmore")

    found = outcome(Trial(fail, fail, fail, 1, 1, "tf32"))
    assert not found.right
    assert bench.verdict(found, True) == "FAILED: RuntimeError: no image for this device"


def test_a_faster_library_is_said_to_be_faster(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tiles, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def takes(seconds: float):
        return lambda: now.append(now.pop() + seconds)

    slower = outcome(trial(ours=takes(0.004), library=takes(0.001)))
    assert slower.ratio == pytest.approx(0.25) and "slower" in bench.verdict(slower, True)
    faster = outcome(trial(ours=takes(0.001), library=takes(0.004)))
    assert (
        faster.ratio == pytest.approx(4)
        and "faster" in bench.verdict(faster, True)
        and "of the roofline" in bench.verdict(faster, True)
    )


def test_the_roofline_is_the_longer_of_two():
    h100 = gpus.find("H100")
    by_units = trial()
    assert bench.roofline_of(by_units, h100) == 1e9 / h100.peaks["tf32"]
    by_memory = Trial(by_units.ours, by_units.library, by_units.check, 1.0, 1e9, "tf32")
    assert bench.roofline_of(by_memory, h100) == 1e9 / h100.bandwidth
    assert bench.roofline_of(by_units, None) is None


def test_after_the_deadline_a_kernel_is_checked_and_not_timed():
    found = outcome(trial(), deadline=time.monotonic() - 1)
    assert found.right and found.ours is None
    assert "not timed" in bench.verdict(found, True)


@pytest.mark.parametrize("case", bench.cases(), ids=lambda case: f"{case.kernel} {case.label}")
def test_every_case_is_right_on_this_cpu(case):
    found = bench.outcome_of(case, CPU, None, deadline=0.0)
    assert found.right, bench.verdict(found, False)


def test_a_wrong_kernel_is_found(monkeypatch):
    """The check itself can fail: an operator that is off by a thousandth is."""
    exact = bench.ops.syrk_

    def off(F, X, alpha, beta):
        exact(F, X, alpha, beta)
        F[0][0, 0] *= 1.001

    monkeypatch.setattr(bench.ops, "syrk_", off)
    (case,) = [case for case in bench.cases() if case.label == "X (4096, 512) float32"]
    found = bench.outcome_of(case, CPU, None, deadline=0.0)
    assert not found.right


def test_the_command_on_a_cpu_says_that_no_gpu_was_measured(tmp_path, capsys):
    out = tmp_path / "report"
    assert cli.main(["kernels", "--only", "fused_update", "--seconds", "0", "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "No GPU was measured" in printed and "fused_update: right in all 2" in printed
    held = json.loads((out / "kernels.json").read_text())
    assert held["measured_a_gpu"] is False and len(held["outcomes"]) == 2
    assert "No GPU was measured" in (out / "kernels.html").read_text()


def test_a_wrong_kernel_fails_the_command(tmp_path, capsys, monkeypatch):
    wrong = Case("syrk", "label", "library", lambda device, divisor: trial(1.0))
    monkeypatch.setattr(bench, "cases", lambda: [wrong])
    assert cli.main(["kernels", "--seconds", "0", "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "WRONG or failed in 1 of 1" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("--only", "gemm"), ("--seconds", "-1"), ("--device", "tpu")], ids=" ".join)
def test_mistakes(capsys, arguments):
    assert cli.main(["kernels", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kfac-bench: ") and error.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@pytest.mark.parametrize("case", bench.cases(), ids=lambda case: f"{case.kernel} {case.label}")
def test_every_case_is_right_on_the_gpu(case):
    found = bench.outcome_of(case, torch.device("cuda"), None, deadline=0.0)
    assert found.right, bench.verdict(found, True)
