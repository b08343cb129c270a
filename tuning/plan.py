"""What a study is of, and whether what was asked for can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import kfac_triton.tuning.limits as limits
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.search import pruner
from kfac_triton.tuning.space import SPACES
from kfac_triton.tuning.task import Task

VERSION = 1  # of what a study means; another one is another study
LEADERS, REPEATS = 4, 2  # settings that run again, and on how many more seeds
HELD_OUT = 10_000  # the first seed that no search has seen
LONGEST_NAME = 200  # characters of a study's name
SLOWER = 1.15  # a run's seconds, evaluations and the rest included
SECONDS = 60.0  # of a run, where nothing else says how long


@dataclass(frozen=True)
class Plan:
    """What a study is of. Every worker on a storage reads it there; `identity` is what must not change."""

    task: str
    signature: str
    seconds: float
    target: float | None
    seed: int
    space: dict[str, str]
    trials: int
    baselines: tuple[str, ...]
    pruner: str
    evaluations: int
    version: int = VERSION

    @property
    def identity(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k not in ("trials", "baselines", "pruner", "evaluations")}


def check(asked: Mapping[str, Any], task: Task | str) -> None:
    """Raises: Mistake: an argument of `tuner.tune` cannot be."""
    limits.whole("--trials", asked["trials"], limits.TRIALS)
    limits.seconds("--seconds", asked["seconds"])
    limits.seconds("--timeout", asked["timeout"])
    limits.whole("--jobs", asked["jobs"], limits.JOBS)
    limits.whole("--seeds", asked["seeds"], limits.SEEDS)
    why = f"; the seeds from {HELD_OUT} on are held out"
    limits.whole("--seed", asked["seed"], HELD_OUT - REPEATS - 1, least=0, why=why)
    _check_names(asked["study"], asked["storage"])
    if asked["jobs"] > 1 and asked["storage"] is None:
        raise Mistake(f"--jobs {asked['jobs']} needs a --storage that the processes share, as a journal file")
    if asked["jobs"] > 1 and not isinstance(task, str):
        raise Mistake(f"--jobs {asked['jobs']} needs a task that each process can load: path/to/file.py:factory")
    if isinstance(asked["target"], str) and asked["target"] != "defaults":
        raise Mistake(f"--target {asked['target']}: a number, or defaults")
    if isinstance(asked["target"], (int, float)):
        limits.finite("--target", asked["target"])
    unknown = [name for name in asked["baselines"] if name not in SPACES or name == "kfac"]
    if unknown:
        allowed = ", ".join(name for name in SPACES if name != "kfac")
        raise Mistake(f"--baselines {','.join(unknown)}: among {allowed}, or none")
    pruner(asked["prune"], asked["trials"])


def _check_names(study: str | None, storage: str | None) -> None:
    if study is not None and not (study.strip() and study.isprintable() and len(study) <= LONGEST_NAME):
        raise Mistake(
            f"--study {study[:LONGEST_NAME]!r}: 1 to {LONGEST_NAME} printable characters; without --study it has the "
            "task's name"
        )
    if storage is not None and not storage.strip():
        raise Mistake(f"--storage {storage!r}: name a journal file or a database, or leave --storage out")


def seconds_for(asked: Mapping[str, Any]) -> float:
    """Of a run: such that everything fits into the timeout, half of the searches' seconds pruned."""
    if asked["timeout"] is None:
        return SECONDS
    searches = 1 + len(asked["baselines"])
    runs = searches * (0.6 * asked["trials"] + LEADERS * REPEATS) + (searches + 1) * asked["seeds"]
    return max(0.1, float(f"{min(asked['timeout'] / (SLOWER * runs), SECONDS):.3g}"))


def short_spec(spec: str) -> str:
    """A task's name without the folder, which may be another on another machine."""
    source, colon, factory = spec.rpartition(":")
    return f"{Path(source).name}:{factory}" if colon and source.endswith(".py") else spec
