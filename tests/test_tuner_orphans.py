"""Workers end with the command that began them, whenever it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from kfac_triton.tuning import machine_code, orphans
from kfac_triton.tuning import trials as trials_of
from kfac_triton.tuning.orphans import worker_command

if sys.platform == "win32":
    pytest.skip("Windows keeps no number of a process's parent up to date", allow_module_level=True)

CHILD = """
import importlib.util, os, signal, sys, time
found = importlib.util.spec_from_file_location("orphans", sys.argv[1])
orphans = importlib.util.module_from_spec(found)
found.loader.exec_module(orphans)
orphans.LOOK = orphans.GRACE = 0.05
def leave(*_):
    print("gave back", flush=True)
    raise SystemExit
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[2] == "deaf" else leave)
orphans.end_with(int(sys.argv[3]))
print("ready", flush=True)
time.sleep(100)
print("outlived its parent", flush=True)
"""
PARENT = """
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", *sys.argv[1:], str(os.getpid())]).wait()
"""


@pytest.mark.parametrize(("ears", "said"), [("open", "gave back\n"), ("deaf", "")])
def test_a_worker_ends_when_its_parent_is_killed_and_gives_back_what_it_was_at(ears, said):
    command = [sys.executable, "-c", PARENT, CHILD, orphans.__file__, ears]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert running.stdout.readline() == "ready\n"
    running.kill()
    assert running.stdout.read() == said, "the pipe ends with the last process that holds it"
    running.wait()


def test_a_worker_watches_before_it_imports_the_package(tmp_path, monkeypatch):
    """Its module finds the thread, its arguments and its name; nothing of the package is loaded."""
    (tmp_path / "asked.py").write_text(
        "import sys, threading\n"
        "print(__name__, sys.argv[1:], [t.name for t in threading.enumerate()], 'torch' in sys.modules)\n"
        "raise SystemExit(7)\n"
    )
    ended = subprocess.run(worker_command("asked", "one", "two"), cwd=tmp_path, capture_output=True, text=True)
    assert ended.stdout == "__main__ ['one', 'two'] ['MainThread', 'parent'] False\n" and ended.returncode == 7


def test_a_worker_that_begins_after_its_parents_death_ends_too():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    command = [sys.executable, "-c", CHILD, orphans.__file__, "open", str(gone.pid)]
    assert "outlived" not in subprocess.run(command, capture_output=True, text=True).stdout


def test_it_looks_at_its_parent_asks_and_then_insists(monkeypatch):
    parents, done = iter([7, 7, 7, 1]), []
    system = SimpleNamespace(
        getppid=lambda: next(parents), getpid=lambda: 9, kill=lambda process, sign: done.append((process, sign))
    )
    monkeypatch.setattr(orphans, "os", system)
    monkeypatch.setattr(orphans, "time", SimpleNamespace(sleep=done.append))
    orphans._watch(7)
    waits = [orphans.LOOK] * 3
    assert done == [*waits, (9, signal.SIGTERM), orphans.GRACE, (9, signal.SIGKILL)]
    assert orphans.LOOK + orphans.GRACE < 5


def test_a_process_that_compiles_watches_who_began_it(monkeypatch):
    watched: list[int] = []
    monkeypatch.setattr(machine_code, "end_with", watched.append)

    class Pool:
        def __init__(self, jobs, *, mp_context, initializer, initargs) -> None:
            initializer(*initargs)

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...

        def map(self, *_: object) -> list[object]:
            return []

    monkeypatch.setattr(machine_code, "ProcessPoolExecutor", Pool)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert list(machine_code.examine([], 1)) == []
    assert watched == [os.getpid()]


# ------------------------------------------------------------------------------------------------------- real commands

TASK = """
import torch
from kfac_triton.tuning import Task

def factory():
    def batches(seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(64, 6, generator=generator)
            yield x, (x[:, :1] * x[:, 1:2] > 0).long().squeeze(1)
    return Task(
        model=lambda: torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)),
        batches=batches, loss=torch.nn.functional.cross_entropy, likelihood="categorical",
    )
"""
MAIN = "import sys; from kfac_triton.{}.cli import main; raise SystemExit(main(sys.argv[1:]))"
PATIENCE = 300.0  # seconds, for a machine that has much else to do


def children(process: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def at_work(folder: Path, helpers: list[int]) -> bool:
    """Whether each of the helpers has begun a trial."""
    journal = folder / "tuned.journal"
    text = journal.read_text() if journal.is_file() else ""
    return all(f'"process":{helper},' in text for helper in helpers)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads the children of a process in /proc")
@pytest.mark.parametrize("when", ["as they begin", "at work"])
def test_kill_9_of_kfac_tune_leaves_no_worker(tmp_path, when):
    (tmp_path / "task.py").write_text(TASK)
    arguments = [
        "run", "task.py:factory", "--jobs", "3", "--trials", "100", "--seconds", "2", "--device", "cpu", "--quiet"
    ]  # fmt: skip
    running = subprocess.Popen([sys.executable, "-c", MAIN.format("tuning"), *arguments], cwd=tmp_path)
    helpers: list[int] = []
    try:
        until(lambda: len(children(running.pid)) == 2)
        helpers = children(running.pid)
        if when == "at work":
            until(lambda: at_work(tmp_path, helpers))
        running.kill()
        running.wait()
        until(lambda: not any(trials_of._started(helper) for helper in helpers))
    finally:
        running.kill()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads the children of a process in /proc")
def test_kill_9_of_kfac_bench_leaves_no_run(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    arguments = [
        "run", "task.py:factory", "--optimizers", "sgd-default", "--seconds", "1000", "--isolate", "--seeds", "1",
        "--device", "cpu", "--threads", "1", "--quiet",
    ]  # fmt: skip
    running = subprocess.Popen([sys.executable, "-c", MAIN.format("benchmarks"), *arguments], cwd=tmp_path)
    try:
        until(lambda: children(running.pid))
        (run,) = children(running.pid)
        running.kill()
        running.wait()
        until(lambda: not trials_of._started(run))
    finally:
        running.kill()
