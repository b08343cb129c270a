"""The command: what it leaves behind, its exit status, and one helpful line for each mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kfac_triton.benchmarks import cli
from kfac_triton.tuning import commands, environment

FILE = """
import torch
from kfac_triton.tuning import Task

def factory():
    def batches(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(5):
            inputs = torch.randn(16, 3, generator=generator)
            yield inputs, inputs.sum(1, keepdim=True)

    return Task(
        model=lambda: torch.nn.Linear(3, 1),
        batches=batches,
        loss=torch.nn.functional.mse_loss,
        likelihood="gaussian",
    )
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "task.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return "task.py:factory"


def small(spec: str, *more: str) -> list[str]:
    return ["run", spec, "--trials", "2", "--seconds", "0.03", "--seeds", "3", "--threads", "1", *more]


def test_a_run_leaves_a_report_and_the_same_command_has_nothing_left_to_do(
    spec: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(small(spec)) == 0
    out, log = capfd.readouterr()
    assert "kfac" in out and str(Path("report/index.html")) in out
    assert "\x1b" not in log, "no bars where there is no terminal"
    assert "targets: sgd" in log and log.count("(race)") == 9
    left = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"results.json", "results.csv", "index.html", "pictures", "plan.json"} <= left
    assert cli.main(small(spec)) == 0
    again, log = capfd.readouterr()
    assert "(race)" not in log and "setting" not in log.split("\n", 1)[1]
    assert again == out
    assert cli.main(["report", "report"]) == 0
    assert capfd.readouterr().out == out


def test_a_finished_folder_is_begun_anew_when_asked(spec: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(small(spec, "--optimizers", "sgd-default", "--quiet")) == 0
    assert capfd.readouterr().err == ""
    assert cli.main(small(spec, "--optimizers", "sgd")) == commands.MISTAKE
    assert "another plan (optimizers sgd-default there, sgd here)" in capfd.readouterr().err
    assert cli.main(small(spec, "--optimizers", "sgd", "--overwrite")) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "no-such-task"], "unknown task 'no-such-task': built in are digits"),
        (["run", "--optimizers", "sgd,lion"], "unknown optimizer 'lion': one of sgd, nesterov, adamw, soap, kfac"),
        (["run", "broken.py:factory"], "broken.py does not import: SyntaxError"),
        (["run", "missing.py:factory"], "there is no file missing.py"),
        (["run", "mnist", "--data", "empty"], "--data empty: no MNIST there; it needs train-images-idx3-ubyte"),
        (["run", "digits", "--data", "nowhere"], "--data nowhere: there is no such folder"),
        (["run", "task.py:factory", "--out", "full"], "--out full is not empty"),
        (["run", "task.py:factory", "--out", "task.py"], "--out task.py is a file"),
        (["run", "task.py:factory", "--device", "abacus"], "--device 'abacus'"),
        (["run", "task.py:factory", "--seeds", "many"], "--seeds"),
        (["run", "--no-such-option"], "--no-such-option"),
        (["report", "full"], "full holds no kfac-bench run"),
        (["step", "task.py:factory", "--batch", "0"], "--batch 0: at least 1"),
        (["step", "no-such-task"], "unknown task"),
    ],
)
def test_a_mistake_ends_with_two_and_says_how_to_mend_it(
    spec: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    (tmp_path / "broken.py").write_text("def factory(:\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    before = sorted(path.name for path in tmp_path.rglob("*") if "__pycache__" not in str(path))
    assert cli.main(arguments) == commands.MISTAKE == 2
    complaint = capfd.readouterr().err
    assert said in complaint and "Traceback" not in complaint
    if complaint.startswith("kfac-bench: "):
        assert complaint.count("\n") == 1
    after = sorted(path.name for path in tmp_path.rglob("*") if "__pycache__" not in str(path))
    assert after == before, "a refused command leaves nothing behind"


def test_a_damaged_file_in_a_report_is_named(spec: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(small(spec, "--optimizers", "sgd-default", "--quiet")) == 0
    capfd.readouterr()
    run = next((tmp_path / "report" / "runs").rglob("*.1.json"))
    run.write_text(run.read_text()[:100])
    assert cli.main(["report", "report"]) == 2
    complaint = capfd.readouterr().err
    assert str(run.relative_to(tmp_path)) in complaint and complaint.count("\n") == 1


def test_a_fault_of_ours_ends_with_one(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kfac_triton.benchmarks import race

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(race.Race, "go", broken)
    assert cli.main(small(spec)) == commands.FAULT == 1


def test_the_built_in_tasks_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tasks"]) == 0
    listed = capfd.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == [
        "digits",
        "digits-autoencoder",
        "curves",
        "mnist",
        "faces",
        "fashion-cnn",
        "resnet",
        "char-lstm",
        "char-gpt",
        "adding",
        "digits-vit",
        "small-autoencoder",
        "chain-24x16",
    ]
    assert "784-400-200-100-50-25-6" in listed and "784-1000-500-250-30" in listed


def test_steps_are_compared(spec: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["step", spec, "--chunks", "2", "--chunk", "4", "--inverse-interval", "2", "--no-compile"]
    assert cli.main(arguments) == 0
    table = capfd.readouterr().out
    assert all(word in table for word in ("sgd", "adamw", "kfac", "1.00", "4 steps"))


def test_help_imports_neither_optuna_nor_matplotlib() -> None:
    code = (
        "import sys; from kfac_triton.benchmarks import cli; status = cli.main(['--help']); "
        "print(status, [name for name in ('optuna', 'matplotlib', 'jinja2', 'sklearn') if name in sys.modules])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert answer.stdout.splitlines()[-1] == "0 []"


def test_the_code_of_a_result_is_named() -> None:
    digest = environment.code_digest()
    assert (
        len(digest) == 12 and digest == environment.code_digest() == environment.describe(torch.device("cpu"))["code"]
    )
