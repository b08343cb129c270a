"""One measured run, in this process or in a fresh one: `python -m kfac_triton.benchmarks.worker JOB.json RESULT.json`.

A fresh process makes peak memory and compilation the run's own. It prints a line of JSON at every evaluation.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kfac_triton.tuning import environment
from kfac_triton.tuning.baselines import find_entrant
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.orphans import worker_command
from kfac_triton.tuning.problems import find_task
from kfac_triton.tuning.store import read_json, write_json
from kfac_triton.tuning.task import Task
from kfac_triton.tuning.trainer import Budget, Point, train

MISTAKE = 2
Progress = Callable[[Point], None]


@dataclass(frozen=True)
class Job:
    """Everything that decides a run."""

    task: str
    optimizer: str
    hyper: dict[str, Any]
    seed: int
    stage: str
    seconds: float
    evaluations: int
    device: str
    threads: int
    compile: bool
    data: str | None


def measure(job: Job, task: Task | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Runs `job` here and returns its record."""
    torch.set_num_threads(job.threads)
    device, alone = environment.find_device(job.device), task is None
    if task is None:
        task = find_task(job.task, Path(job.data) if job.data else None, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def judged(point: Point) -> bool:
        if progress:
            progress(point)
        return False

    budget = Budget(job.seconds, job.evaluations, device, job.compile, stop=judged)
    run = train(task, find_entrant(job.optimizer), job.hyper, job.seed, budget)
    return {
        "job": asdict(job),
        "run": run.as_dict(),
        "final": run.final,
        "peak_memory": environment.peak_memory(device),
        "own_process": alone,
        "metric": task.metric,
        "data": list(task.data),
        "environment": environment.describe(device),
    }


def measure_apart(job: Job, progress: Progress | None = None) -> dict[str, Any]:
    """Runs `job` in a fresh process.

    Raises:
        Mistake: what the process found wrong with the task; RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory(prefix="kfac-bench-") as folder:
        asked, answered, complaint = (Path(folder) / name for name in ("job.json", "result.json", "stderr"))
        write_json(asked, asdict(job))
        command = worker_command(__name__, str(asked), str(answered))
        with (
            complaint.open("w") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
        ):
            try:
                for line in child.stdout or ():
                    if progress and line.startswith('{"seconds"'):
                        progress(Point(**json.loads(line)))
                status = child.wait()
            except BaseException:
                child.kill()
                raise
        said = complaint.read_text().strip()
        if status == MISTAKE:
            raise Mistake(said.splitlines()[-1] if said else f"{job.task}: refused")
        if status != 0:
            raise RuntimeError(
                f"the run of {job.optimizer} on {job.task}, seed {job.seed}, ended with {status}:\n{said[-4000:]}"
            )
        return read_json(answered)


def main(arguments: list[str]) -> int:
    asked, answered = (Path(argument) for argument in arguments)
    try:
        record = measure(Job(**read_json(asked)), progress=lambda point: print(json.dumps(asdict(point)), flush=True))
    except Mistake as mistake:
        print(mistake, file=sys.stderr)
        return MISTAKE
    write_json(answered, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
