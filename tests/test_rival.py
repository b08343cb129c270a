"""The comparison with kfac-jax: both sides get the same problem, and what is wrong with a Python is said."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from kfac_triton.benchmarks import cli
from kfac_triton.benchmarks.rival import Curve, Options, _laid_out, _marks, compare, print_comparison
from kfac_triton.tuning.problems import AUTOENCODERS, JUDGED, find_task

pytest.importorskip("sklearn")
SMALL = Options("digits-autoencoder", sys.executable, seconds=1.0)


def test_both_sides_get_the_same_problem(tmp_path: Path) -> None:
    laid = np.load(_laid_out(SMALL, None, tmp_path, seed=3))
    task = find_task("digits-autoencoder")
    torch.manual_seed(3)
    layers = [layer for layer in task.model() if isinstance(layer, torch.nn.Linear)]
    for i, layer in enumerate(layers):
        assert np.array_equal(laid[f"weight_{i}"], layer.weight.detach().numpy())
        assert np.array_equal(laid[f"bias_{i}"], layer.bias.detach().numpy())
    assert len(laid["order"]) == 2000  # SMALL.seconds of the most steps that either side could take
    for rows, (batch, _) in zip(laid["order"], task.batches(3), strict=False):
        assert np.array_equal(laid["images"][rows], batch.numpy())
    images = AUTOENCODERS["digits-autoencoder"].load(None).train
    assert np.array_equal(laid["judged"], images[:JUDGED].numpy())


def test_the_marks_are_the_nearest_evaluations() -> None:
    curve = Curve("kfac-jax", 1, [[0.0, 0, 9.0], [10.2, 50, 5.0], [20.6, 99, 3.0], [120.0, 600, 1.0]], 200.0)
    late = Curve("kfac-jax", 1, [[0.0, 0, 9.0], [12.0, 12, 5.0], [21.0, 21, 3.0]], 1000.0)
    assert late.at(10.0) == 5.0
    assert [curve.at(seconds) for seconds in (0.0, 5.0, 10.0, 20.0, 40.0, 120.0)] == [9.0, 9.0, 5.0, 3.0, 3.0, 1.0]
    other = Curve("kfac-paper", 1, [[0.0, 0, 8.0], [10.0, 90, 4.0], [120.0, 1000, 0.5]], 120.0)
    marks = _marks([other, curve], 120.0)
    assert marks[0] == {"seconds": pytest.approx(10.0), "kfac-paper": 4.0, "kfac-jax": 5.0}
    assert marks[3] == {"seconds": 120.0, "kfac-paper": 0.5, "kfac-jax": 1.0}


def test_the_table_counts_from_the_best_known_error() -> None:
    found = {
        "options": {"task": "mnist"}, "grid": {"0.1": 3.0, "1.0": 4.0}, "initial_damping": 0.1,
        "marks": [{"seconds": 10.0, "kfac-paper": 4.0, "kfac-jax": 7.0}],
        "curves": [{"points": [[10.0, 1, 4.0]]}, {"points": [[10.0, 1, 7.0], [20.0, 2, 1.0]]}],
        "ms_per_step": {"kfac-paper": 150.0, "kfac-jax": 250.0},
    }  # fmt: skip

    def printed(best_known: float | None) -> str:
        text = io.StringIO()
        print_comparison(found, best_known, Console(file=text, width=120))
        return text.getvalue()

    assert "0.50" in printed(None) and "best known 1" in printed(None)
    assert "0.25" in printed(3.0)
    assert "none left" in printed(7.0)
    assert "0.60 of it" in printed(None) and "best of 0.1, 1.0: 0.1" in printed(None)


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jax.py").write_text("raise ImportError('no jax in here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    small = ["digits-autoencoder", "--seconds", "1", "--grid-seconds", "0.1"]
    for arguments, said in (
        (["digits"], "task 'digits': kfac-jax is compared on digits-autoencoder, curves, mnist, faces"),
        ([*small, "--python", "nowhere/python"], "--python nowhere/python does not run"),
        (small, "kfac-jax does not run there (ImportError: no jax in here); make an environment with pip install jax"),
        ([*small, "--grid", "small"], "--grid small: numbers with commas"),
        ([*small, "--grid", "0.1,0"], "--grid 0.1,0: dampings above 0"),
        ([*small, "--seeds", "0"], "--seeds 0: at least 1"),
    ):
        assert cli.main(["rival", *arguments]) == 2
        assert said in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif("KFAC_JAX_PYTHON" not in os.environ, reason="KFAC_JAX_PYTHON names no Python with kfac-jax")
def test_kfac_jax_runs(tmp_path: Path) -> None:
    options = Options(
        "digits-autoencoder", os.environ["KFAC_JAX_PYTHON"], seconds=3.0, grid=(0.01, 1.0), grid_seconds=1.0
    )
    found = compare(options, None, tmp_path, Console(file=io.StringIO()))
    for curve in found["curves"]:
        first, last = curve["points"][0][2], curve["points"][-1][2]
        assert last < 0.5 * first
    starts = [curve["points"][0][2] for curve in found["curves"]]
    assert starts[0] == pytest.approx(starts[1], rel=1e-4)
    assert found["versions"]["kfac-jax"] and (tmp_path / "rival.json").is_file()
