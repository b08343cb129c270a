"""The search for tiles: candidates are compiled ahead of time, the hopeless thrown out, the rest ranked by the model.

On a GPU the best of the ranking are timed there, on tensors of the search's own: the operators update running averages
in place, and one that was timed on the user's would have decayed once for every repetition.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kfac_triton.tuning.gpus as gpus
import kfac_triton.tuning.machine_code as machine_code
import kfac_triton.tuning.roofline as roofline
import kfac_triton.tuning.shapes as shapes
from kfac_triton import tuned
from kfac_triton.kernels import tiles as kernel_tiles
from kfac_triton.kernels.tiles import Choice, Tile
from kfac_triton.tuning.gpus import GPU
from kfac_triton.tuning.machine_code import Configuration, Facts
from kfac_triton.tuning.roofline import Estimate, Footprint, Work
from kfac_triton.tuning.shapes import Shape
from kfac_triton.tuning.store import write_json, write_text
from kfac_triton.tuning.task import Task

TRITON_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "bf16"}
PARTS = (1, 2, 4, 8, 16, 32)
SAVE_EVERY = 8  # compiled configurations between two writes of what is known
TMA = ("sm_90", "sm_100", "sm_120")
TIMED_ROUNDS, WARM_UP = 20, 3
TOP = 6  # candidates of each shape that a device times

Notify = Callable[[int, int], None]  # (done, in all)


class Problem(NamedTuple):
    """What candidates are compiled for: kernel, dtype and precision of a device's generation."""

    target: str
    kernel: str
    dtype: str
    precision: str

    def configuration(self, tile: Tile, split: bool) -> Configuration:
        """As `machine_code` compiles it, with all that makes the kernel large; float16 counts as bfloat16."""
        kernel = "grouped" if self.kernel == "kron_matmul" else self.kernel
        options = (("epilogue", "dot"),) if kernel == "grouped" else (("split", split),)
        return Configuration(self.target, kernel, TRITON_NAMES[self.dtype], tile, self.precision, options)


class Row(NamedTuple):
    """The outcome for one shape: `ranking` best first, as the model has it or as it was measured; seconds of each."""

    problem: Problem
    shape: Shape
    ranking: list[tuple[Choice, float]]
    bound: str
    source: str


def precisions(target: str, kernel: str, dtype: str) -> tuple[str, ...]:
    """What a launcher may ask for there."""
    if dtype != "float32":
        return ("ieee",)
    if target.startswith("gfx"):
        return ("ieee",)
    return ("tf32x3", "tf32") if kernel == "syrk" and target in TMA else ("tf32x3",)


def candidates(problem: Problem) -> list[Tile]:
    """Square tiles worth compiling: a side of 128 takes eight warps; four spill, sixteen idle."""
    descriptors = problem.precision == "tf32"
    terms = (16, 32) if problem.dtype == "float32" else (32, 64)
    deepest = (2,) if problem.target.startswith("gfx") else (3, 4)
    found = []
    for block, warps in ((128, 8), (64, 4), (64, 8), (32, 4), (32, 2)):
        for block_k in (*terms, terms[-1] * 2) if block < 128 else terms:
            found += [Tile(block, block_k, warps, stages, descriptors) for stages in deepest]
    return found


class KnownFacts:
    """Facts by configuration, kept in a file, so that an interrupted search goes on where it was."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.digest = path, _digest()
        self.known: dict[str, Facts | str] = {}
        if path is not None and path.is_file():
            try:
                held = json.loads(path.read_text())
            except ValueError:
                held = {}
            if held.get("digest") == self.digest:
                self.known = {name: _facts(value) for name, value in held["facts"].items()}

    def learn(self, configurations: Iterable[Configuration], jobs: int | None, notify: Notify) -> None:
        """Compiles what is not known yet."""
        wanted = list(dict.fromkeys(configurations))
        missing = [configuration for configuration in wanted if configuration.name not in self.known]
        done = len(wanted) - len(missing)
        notify(done, len(wanted))
        try:
            for index, facts in machine_code.examine(missing, jobs) if missing else ():
                self.known[missing[index].name] = facts
                done += 1
                notify(done, len(wanted))
                if done % SAVE_EVERY == 0:
                    self.save()
        finally:
            self.save()

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        if self.path is None:
            return
        held = {name: facts if isinstance(facts, str) else facts._asdict() for name, facts in self.known.items()}
        write_json(self.path, {"digest": self.digest, "facts": held})


def _facts(value: Any) -> Facts | str:
    if isinstance(value, str):
        return value
    widths = {kind: {int(w): n for w, n in value[kind].items()} for kind in ("copies", "loads", "stores")}
    return Facts(**{**value, **widths})


def _digest() -> str:
    """Of the kernels' sources and Triton's version: another kernel, other facts."""
    import kfac_triton.kernels.syrk as anchor
    from kfac_triton.kernels._launch import triton

    digest = hashlib.sha256(getattr(triton, "__version__", "none").encode())
    for path in sorted(Path(anchor.__file__).resolve().parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Search:
    """Everything about one device's tiles but the printing."""

    def __init__(self, gpu: GPU, shapes: Sequence[Shape], facts: KnownFacts) -> None:
        self.gpu, self.facts = gpu, facts
        self.wanted = [
            (Problem(gpu.target, shape.kernel, shape.dtype, precision), shape)
            for shape in shapes
            for precision in precisions(gpu.target, shape.kernel, shape.dtype)
        ]
        self.problems = list(dict.fromkeys(problem for problem, _ in self.wanted))

    def compile(self, jobs: int | None, notify: Notify) -> None:
        """Compiles every candidate of every problem."""
        self.facts.learn(
            (
                problem.configuration(tile, split)
                for problem in self.problems
                for tile in candidates(problem)
                for split in ((False,) if problem.kernel == "kron_matmul" else (False, True))
            ),
            jobs,
            notify,
        )

    def faults(self, problem: Problem) -> dict[Tile, list[str]]:
        """Why each candidate is thrown out; an empty list where it is not."""
        return {tile: self._faults(problem, tile) for tile in candidates(problem)}

    def _faults(self, problem: Problem, tile: Tile) -> list[str]:
        found: list[str] = []
        for split in (False,) if problem.kernel == "kron_matmul" else (False, True):
            configuration = problem.configuration(tile, split)
            facts = self.facts.known[configuration.name]
            found += [facts] if isinstance(facts, str) else facts.faults(configuration)
        return list(dict.fromkeys(found))

    def thrown_out(self) -> Counter[str]:
        """How many candidates fell, by the first reason's kind."""
        reasons = [faults[0] for p in self.problems for faults in self.faults(p).values() if faults]
        return Counter(reason.lstrip("0123456789 ") for reason in reasons)

    def rows(self, top: int) -> list[Row]:
        """The ranking of every shape by the model, as long as `top`."""
        kept = {p: [tile for tile, faults in self.faults(p).items() if not faults] for p in self.problems}
        return [self._row(problem, shape, kept[problem], top) for problem, shape in self.wanted]

    def _row(self, problem: Problem, shape: Shape, tiles: Sequence[Tile], top: int) -> Row:
        ranking = roofline.ranked(self.gpu, work_of(problem, shape), self._choices(problem, shape, tiles))
        best: list[tuple[Choice, Estimate]] = [
            (Choice(Tile(*tile), parts), estimate)  # type: ignore[misc]
            for estimate, tile, parts in ranking[:top]
        ]
        bound = best[0][1].bound if best else "no candidate left"
        return Row(problem, shape, [(choice, estimate.seconds) for choice, estimate in best], bound, "model")

    def _choices(self, problem: Problem, shape: Shape, tiles: Sequence[Tile]) -> Iterable[tuple[Tile, int, Footprint]]:
        side = min(shape.size[1:3]) if shape.kernel == "kron_matmul" else shape.size[2]
        for tile in kernel_tiles.fitting(sorted(tiles, key=lambda t: -t.block), side):
            yield from self._in_parts(problem, shape, tile)

    def _in_parts(self, problem: Problem, shape: Shape, tile: Tile) -> Iterable[tuple[Tile, int, Footprint]]:
        work = work_of(problem, shape)
        programs, steps = roofline.programs(work, tile), -(-work.K // tile.block_k)
        for parts in PARTS if problem.kernel != "kron_matmul" else (1,):
            if parts != kernel_tiles.clipped_parts(parts, tile, programs, steps):
                continue
            facts = self.facts.known[problem.configuration(tile, parts > 1).name]
            assert isinstance(facts, Facts)
            narrowest = min(facts.copies, default=16)
            yield tile, parts, Footprint(facts.registers, facts.shared, narrowest)


def work_of(problem: Problem, shape: Shape) -> Work:
    """A launch as the model takes it."""
    kind = {"bfloat16": "bf16", "float16": "fp16"}.get(problem.dtype, problem.precision)
    size = 4 if problem.dtype == "float32" else 2
    if shape.kernel == "kron_matmul":
        count, M, N, K = shape.size
        return Work(count, M, N, K, kind, size, output=4)
    count, rows, d = shape.size
    return Work(count, d, d, rows, kind, size, symmetric=True)


def contents(gpu: str, target: str, rows: Sequence[Row], source: str) -> dict[str, Any]:
    """What a tile file holds: the first of every ranking, with its time if that was measured."""
    from kfac_triton.kernels._launch import triton

    entries = {}
    for row in rows:
        if row.ranking:
            choice, seconds = row.ranking[0]
            bucket = kernel_tiles.bucket(row.shape.size)
            timed = {"microseconds": round(seconds * 1e6, 1)} if source == "measured" else {}
            entries[row.problem.kernel, row.problem.dtype, row.problem.precision, bucket] = {
                "kernel": row.problem.kernel, "dtype": row.problem.dtype, "precision": row.problem.precision,
                "shape": list(bucket), "tile": [int(n) for n in choice.tile], "parts": choice.parts,
                **timed,
            }  # fmt: skip
    return {
        "format": tuned.FORMAT, "gpu": gpu, "target": target, "source": source,
        "triton": getattr(triton, "__version__", None), "entries": list(entries.values()),
    }  # fmt: skip


def write(path: Path, held: dict[str, Any]) -> None:
    """Writes a tile file, one entry a line, whole or not at all."""
    head = {name: value for name, value in held.items() if name != "entries"}
    entries = ",\n".join(json.dumps(entry) for entry in held["entries"])
    write_text(path, json.dumps(head)[:-1] + ', "entries": [\n' + entries + "\n]}\n")


def measured_for(task: Task, device: torch.device) -> Path:
    """Measures tiles for the shapes of a task's own steps; they join the device's tile file, which is returned."""
    name, target = torch.cuda.get_device_name(device), tuned.target_of(device)
    facts = KnownFacts(tuned.cache_folder() / f"facts-{target}.json")
    search = Search(gpus.find(name) or gpus.for_target(target), shapes.of_task(task), facts)
    search.compile(None, lambda done, total: None)
    held = contents(name, target, [measured(row, device) for row in search.rows(TOP)], "measured")
    path = tuned.cache_folder() / tuned.file_name(name)
    try:
        before = tuned.read(path)
    except ValueError:  # none yet, or damaged
        before = {}
    if before.get("source") == "measured" and before.get("target") == target:
        held["entries"] = _joined(before["entries"], held["entries"])
    write(path, held)
    return path


def _joined(before: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries by what they are for, the new ones in the place of old ones."""
    names = ("kernel", "dtype", "precision", "shape")
    return list({str([entry[name] for name in names]): entry for entry in (*before, *new)}.values())


# ------------------------------------------------------------------------------------------------------------ measuring


def measured(row: Row, device: torch.device, rounds: int = TIMED_ROUNDS) -> Row:
    """The row's candidates by their median time on the device, interleaved, on tensors of their own."""
    runs = {choice: _launches(row, choice, device) for choice, _ in row.ranking}
    for launches in runs.values():
        for i in range(WARM_UP):
            launches[i % len(launches)]()
    times: dict[Choice, list[float]] = {choice: [] for choice in runs}
    for i in range(rounds):
        for choice, launches in runs.items():
            times[choice].append(seconds_of(launches[i % len(launches)], device))
    ranking = sorted(((choice, statistics.median(found)) for choice, found in times.items()), key=lambda one: one[1])
    return row._replace(ranking=ranking, source="measured")


def seconds_of(run: Callable[[], None], device: torch.device) -> float:
    """The time of one launch, by the device's own clock where it has one."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _launches(row: Row, choice: Choice, device: torch.device) -> list[Callable[[], None]]:
    """The launch on several sets of buffers, so many that none is still in the cache when its turn comes."""
    sets = [_launch(row, choice, device)]
    size = sets[0][1]
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    sets += [_launch(row, choice, device) for _ in range(min(7, 2 * cache // max(size, 1)))]
    return [run for run, _ in sets]


def _launch(row: Row, choice: Choice, device: torch.device) -> tuple[Callable[[], None], int]:
    """(a launch on new tensors, their bytes)."""
    from kfac_triton.kernels import _grouped, conv_syrk, syrk

    dtype = getattr(torch, row.shape.dtype)
    half = torch.full((), 0.5, device=device)
    if row.shape.kernel == "kron_matmul":
        count, M, N, K = row.shape.size
        left, right, out = (torch.randn(count, *size, device=device) for size in ((M, K), (K, N), (M, N)))
        tile, precision = choice.tile, row.problem.precision
        run = partial(_grouped.grouped, [out], [left], [right], tile=tile, precision=precision)
        return run, _bytes(left, right, out)
    count, rows, d = row.shape.size
    F = torch.zeros(count, d, d, device=device)
    if row.shape.kernel == "syrk":
        X = torch.randn(count, rows, d, device=device).to(dtype)
        entry = syrk.Entry(F, X, half, half, False)
        return lambda: syrk.launch([entry], choice=choice, precision=row.problem.precision), _bytes(F, X)
    # Three taps of a row of positions each: the most common filter's height, and d is most often whole in it.
    taps = 3 if d % 3 == 0 else 1
    image = torch.randn(count, d // taps, 1, rows, device=device).to(dtype)
    image = image.contiguous(memory_format=torch.channels_last)
    window = conv_syrk.Window((1, taps), (1, 1), (taps // 2, taps // 2, 0, 0))
    entries = [conv_syrk.Entry(F[i], image[i : i + 1], half, half, False, window) for i in range(count)]
    return lambda: conv_syrk.launch(entries, choice=choice, precision=row.problem.precision), _bytes(F, image)


def _bytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)
