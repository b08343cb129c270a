"""`kfac-tune run`, without the printing: what suits K-FAC on a task, and whether it is better than what there was.

1. K-FAC's settings are searched, then those of each baseline, with the same number of trials, seconds and rules. All
   have one seed. 2. The best few of each run again on other seeds; the best mean there wins. 3. The winners and K-FAC's
   defaults run on held-out seeds, interleaved; K-FAC's winner runs with the very arguments that the file will hold.
   Settings that are not better than the defaults there are dropped, and the defaults kept.

Everything is in the storage, under the study's name, so the same call goes on where one was broken off.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import optuna
import torch

import kfac_triton.tuning.environment as environment
import kfac_triton.tuning.preflight as preflight
import kfac_triton.tuning.setting as settings_of
from kfac_triton import tuned
from kfac_triton.schedules import Schedule
from kfac_triton.tuning.baselines import ENTRANTS, Entrant
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.evidence import summary, verdict
from kfac_triton.tuning.objective import Objective
from kfac_triton.tuning.orphans import worker_command
from kfac_triton.tuning.plan import HELD_OUT, LEADERS, REPEATS, SLOWER, VERSION, Plan, check, seconds_for, short_spec
from kfac_triton.tuning.problems import find_task
from kfac_triton.tuning.search import EVALUATIONS, Kind, OutOfTime, Runs, Search, Watch, measure, pruner
from kfac_triton.tuning.space import SPACES, Space
from kfac_triton.tuning.storage import check_storage, lost, open_storage
from kfac_triton.tuning.store import write_json
from kfac_triton.tuning.task import Task, one_line
from kfac_triton.tuning.trainer import Point, evaluate
from kfac_triton.tuning.trials import HOST, REACHED, Result, Trials

ORDINALS = ("first", "second", "third")  # what the starts of a baseline are called
TILE_SECONDS = 900.0  # of a timeout that must be left for kernel tiles to be measured
EVALUATING = 0.2  # of a run's seconds, at most, in evaluations
KEPT_FOR_THE_END = 0.5  # of a timeout, at most, for leaders and held-out seeds
SEARCHED = Entrant("kfac", settings_of.build, schedule=settings_of.by_seconds)
TRIALS, SEEDS = 30, 5
Note = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """A setting that runs on the held-out seeds: its name there, what builds it, and from what."""

    name: str
    entrant: Entrant
    hyper: dict[str, Any]


@dataclass(frozen=True)
class TunedResult:
    """What was found: `arguments` for `KFAC(model, **arguments)`, the defaults if nothing was `better`; `content` is
    that of the tuned file, `study` the search for K-FAC's settings; `finished`: the time sufficed for everything."""

    arguments: dict[str, Any]
    better: bool
    content: dict[str, Any]
    study: optuna.Study
    finished: bool

    def save(self, path: str | Path) -> None:
        """Writes the tuned file, whole or not at all. Raises: Mistake: it can't be written."""
        write(Path(path), self.content)

    def report(self, path: str | Path) -> None:
        """Writes the HTML report. Raises: Mistake: it can't be written."""
        from kfac_triton.tuning.report import write as write_report

        write_report(Path(path), self.study, self.content)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in the middle of a search; the message says how it stands."""


def tune(
    task: Task | str,
    *,
    trials: int = TRIALS,
    seconds: float | None = None,
    timeout: float | None = None,
    target: float | str | None = None,
    storage: str | None = None,
    study: str | None = None,
    jobs: int = 1,
    seed: int = 0,
    seeds: int = SEEDS,
    space: Path | None = None,
    fix: Sequence[str] = (),
    baselines: Sequence[str] = ("sgd", "adamw"),
    prune: str = "auto",
    device: str = "auto",
    data: Path | None = None,
    compile: bool | None = None,
    tiles: bool = True,
    begun: float | None = None,
    note: Note = lambda text: None,
    watch: Watch = lambda what, value: None,
) -> TunedResult:
    """Tunes K-FAC for a task.

    Args:
        task: a `Task`, a built-in name, or path/to/file.py:factory; `jobs` above 1 need one of the last two.
        trials: settings tried, for K-FAC and for each of the baselines.
        seconds: of training for each; from `timeout` if there is one, else 60.
        timeout: seconds for everything.
        target: the metric's value to reach, in place of the task's; "defaults" is what the default settings end with.
        storage, study: where it is kept, and its name there; by default in memory, and the task's.
        space, fix: a file that changes the space, and texts "name=value".
        seed, seeds: of the search, and how many held-out ones.
        baselines: tuned with the same budget and run on the same seeds.
        prune: "auto", or one of the pruners of `search.pruner`.
        compile: K-FAC's Fisher pass; not by default.
        tiles: on a GPU, measure kernel tiles for the task's shapes too.
        begun: when the time began, on the monotonic clock; by default now.
        note, watch: told in words what begins and what came out of it, and of each phase, trial and run
            (`search.Watch`).

    Raises:
        Mistake: the task or an option; Interrupted: by Ctrl-C, and the same call goes on.
    """
    work = Tuning(
        task, trials=trials, seconds=seconds, timeout=timeout, target=target, storage=storage, study=study, jobs=jobs,
        seed=seed, seeds=seeds, space=space, fix=fix, baselines=baselines, prune=prune, device=device, data=data,
        compile=compile, begun=begun, note=note, watch=watch,
    )  # fmt: skip
    try:
        return work.go(tiles)
    except KeyboardInterrupt:
        raise Interrupted(work.standing()) from None
    except lost() as error:
        raise _lost(storage, error) from error


def join(task: str, storage: str, study: str | None = None, *, worker: int | None = None, **options: Any) -> None:
    """Works on the trials of a study that is there until none is left to begin; its plan is in the storage.

    Args:
        worker: which one, for the sampler's seed; by default the process's number.
        options: those of `tune` that are this machine's own: device, data, compile, timeout, jobs, space, fix, note,
            watch.

    Raises:
        Mistake: there is no such study, or it is of another model; KeyboardInterrupt: its trial is back in the queue.
    """
    idle: dict[str, Any] = {
        "trials": 1, "seconds": None, "timeout": None, "target": None, "seed": 0, "seeds": 1, "jobs": 1, "space": None,
        "fix": (), "baselines": (), "prune": "auto", "device": "auto", "data": None, "compile": None,
        "note": lambda text: None, "watch": lambda what, value: None,
    }  # fmt: skip
    number = os.getpid() if worker is None else worker
    asked = {**idle, **options, "storage": storage, "study": study}
    work = Tuning(task, joined=True, worker=number, **asked)
    try:
        work.join()
    except lost() as error:
        raise _lost(storage, error) from error


def _lost(storage: str | None, error: Exception) -> Mistake:
    cause = one_line(error.__cause__ or error)
    return Mistake(f"--storage {storage} was lost ({cause}); once it is back, the same command goes on")


class Tuning:
    """One process's part in the tuning of a task: the arguments are those of `tune`; `joined`: only the search."""

    def __init__(
        self, task: Task | str, *, joined: bool = False, worker: int = 0, begun: float | None = None, **asked: Any
    ) -> None:
        self.begun = time.monotonic() if begun is None else begun
        self.asked, self.joined, self.worker = asked, joined, worker
        self.note: Note = asked["note"]
        self.watch: Watch = asked["watch"]
        check(asked, task)
        if asked["storage"] is not None:
            check_storage(asked["storage"], asked["jobs"])
        self.space = settings_of.read_space(asked["space"], asked["fix"])
        self.deadline = math.inf if asked["timeout"] is None else self.begun + asked["timeout"]
        self.device = environment.find_device(asked["device"])
        self.spec = task if isinstance(task, str) else task.name or "task"
        self.watch("phase", (f"loading {self.spec} and trying a step of it", 0))
        self.task = (
            find_task(task, asked["data"], self.device) if isinstance(task, str) else replace(task, name=self.spec)
        )
        self.ledger: list[Result] = []
        self.warmed: set[Kind] = set()
        model, self.untrained = preflight.check(self.task, self.device)
        self.loaded = time.monotonic()
        self.signature, self.parameters = tuned.signature(model), sum(p.numel() for p in model.parameters())
        self.storage = (
            optuna.storages.InMemoryStorage()
            if asked["storage"] is None
            else open_storage(asked["storage"], asked["jobs"])
        )
        self.name = asked["study"] or short_spec(self.spec)
        self.plan = self._plan()
        self.seeds = asked["seeds"]
        self.tiles: str | None = None
        compile = asked["compile"]
        self.compile = bool(compile)
        self.studies = {name: self._study(name) for name in ("kfac", *self.plan.baselines)}
        self.ready = time.monotonic()

    # ------------------------------------------------------------------------------------------------------- the plan

    def _plan(self) -> Plan:
        """The stored plan of the study, or a new one.

        Raises:
            Mistake: the study is of something else.
        """
        asked, where = self.asked, self.asked["storage"] or "memory"
        there = self._there(self.name)
        if self.joined and not there:
            raise Mistake(f"--join: there is no study {self.name!r} in {where}; begin it without --join")
        main = self._open(self._study_name("kfac"), pruner(asked["prune"], asked["trials"]))
        stored = main.user_attrs.get("plan")
        begun = stored is not None or bool(main.get_trials(deepcopy=False))
        if begun and (stored is None or stored.get("version") != VERSION):
            raise Mistake(f"study {self.name!r} in {where} is none of this version of kfac-tune; name another --study")
        held = None if stored is None else Plan(**{**stored, "baselines": tuple(stored["baselines"])})
        if self.joined:
            if held is None:
                raise Mistake(f"--join: study {self.name!r} in {where} has no plan yet; run kfac-tune without --join")
            if held.signature != self.signature:
                raise Mistake(f"--join: study {self.name!r} is of another model; join it with its own task")
            return held
        plan = self._asked_plan(main, held)
        changed = [] if held is None else [k for k in plan.identity if plan.identity[k] != held.identity[k]]
        if held is not None and changed:
            pairs = [(name, _short(held.identity[name]), _short(plan.identity[name])) for name in changed]
            listed = "; ".join(f"{name} {old} there, {new} here" for name, old, new in pairs)
            raise Mistake(f"study {self.name!r} in {where} is another ({listed}); name another --study or --storage")
        if plan != held:
            main.set_user_attr("plan", asdict(plan))
        return plan

    def _asked_plan(self, main: optuna.Study, held: Plan | None) -> Plan:
        """What the call asks for; what it leaves open is as `held` has it."""
        asked = self.asked
        seconds = asked["seconds"] or (held.seconds if held else seconds_for(asked))
        evaluations = held.evaluations if held else self._evaluations(seconds)
        target = asked["target"] if asked["target"] is not None else self.task.target
        if target == "defaults":
            target = held.target if held else self._end_of_defaults(main, seconds, evaluations)
        return Plan(
            short_spec(self.spec), self.signature, seconds, target, asked["seed"], self.space.describe(),
            asked["trials"], tuple(asked["baselines"]), asked["prune"], evaluations,
        )  # fmt: skip

    def _study_name(self, optimizer: str) -> str:
        return self.name if optimizer == "kfac" else f"{self.name}/{optimizer}"

    def _open(self, name: str, how: optuna.pruners.BasePruner) -> optuna.Study:
        if self._there(name):  # create_study would write, even so
            return optuna.load_study(storage=self.storage, study_name=name, pruner=how)
        return optuna.create_study(storage=self.storage, study_name=name, pruner=how, load_if_exists=True)

    def _there(self, name: str) -> bool:
        return name in [study.study_name for study in self.storage.get_all_studies()]

    def _study(self, optimizer: str) -> optuna.Study:
        return self._open(
            self._study_name(optimizer), pruner(self.plan.pruner, self.plan.trials, self.plan.evaluations)
        )

    def _evaluations(self, seconds: float) -> int:
        """Of a run: as many as take at most a fifth of its seconds, within limits."""
        model = self.task.model().to(self.device)
        begun = time.perf_counter()
        evaluate(self.task, model, self.device)
        spent, most = time.perf_counter() - begun, EVALUATING * seconds
        return next((number for number in EVALUATIONS if number * spent <= most), EVALUATIONS[-1])

    def _end_of_defaults(self, main: optuna.Study, seconds: float, evaluations: int) -> float:
        """What the default settings end with, the median of three seeds."""
        seed, objective = self.asked["seed"], Objective(seconds)
        runs = Runs(self.task, objective, seed, self.device, evaluations, False, self.deadline)
        runs = replace(runs, ledger=self.ledger, warmed=self.warmed)
        contender = Contender("defaults", ENTRANTS["kfac"], {})
        seeds = range(self.asked["seed"], self.asked["seed"] + 3)
        self._phase("measuring the target, which the defaults end with", len(seeds))
        ends = [self._kept(main, "target", contender, seed, runs, f"defaults, seed {seed}").value for seed in seeds]
        return float(f"{median(ends):.4g}")

    # ----------------------------------------------------------------------------------------------------- the stages

    def go(self, tiles: bool = True) -> TunedResult:
        """All stages, as far as the time goes; `tiles`: on a GPU, those of the kernels first."""
        if tiles and self.device.type == "cuda":
            self._measure_tiles()
        self._enqueue()
        helpers = self._helpers()
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // self.asked["jobs"]))
        try:
            self._search()
        finally:
            torch.set_num_threads(threads)
            for helper in helpers:
                helper.terminate()
            for helper in helpers:
                helper.wait()
        winners = {name: self._winner(name) for name in self.studies}
        runs = self._measured(winners)
        return self._result(winners, runs)

    def _phase(self, text: str, runs: int = 0) -> None:
        """What begins, and how many runs it has."""
        self.watch("phase", (text, runs))
        self.note(text)

    def _measure_tiles(self) -> None:
        from kfac_triton.kernels._launch import triton
        from kfac_triton.tuning.tiles import measured_for

        if triton is None or self.deadline - time.monotonic() < TILE_SECONDS:
            self.note("kernel tiles: not measured, for want of triton or of time; kfac-tune kernels does it apart")
            return
        self._phase("measuring kernel tiles")
        self.tiles = measured_for(self.task, self.device).name

    def standing(self) -> str:
        """The best so far, in a line."""
        found = []
        for name, study in self.studies.items():
            results = Trials(study, 0).results()
            best = _best(results)
            text = f"best {best[0].value:.4g} in trial {best[0].number}" if best else "none good yet"
            found.append(f"{name}: {len(results)} of {self.plan.trials} trials, {text}")
        return "; ".join(found)

    def join(self) -> None:
        """The search alone, until no trial is left to begin."""
        self._search(stay=False)

    def _helpers(self) -> list[subprocess.Popen[bytes]]:
        left = None if math.isinf(self.deadline) else self.deadline - time.monotonic()
        asked = self.asked
        orders = {
            "task": self.spec, "storage": asked["storage"], "study": self.name,
            "space": None if asked["space"] is None else str(asked["space"]), "fix": list(asked["fix"]),
            "device": str(self.device), "data": None if asked["data"] is None else str(asked["data"]),
            "compile": self.compile, "timeout": left, "jobs": asked["jobs"],
        }  # fmt: skip
        each = [json.dumps({**orders, "worker": index}) for index in range(1, asked["jobs"])]
        return [subprocess.Popen(worker_command("kfac_triton.tuning.worker", one)) for one in each]

    def _search(self, *, stay: bool = True) -> None:
        for place, (name, study) in enumerate(self.studies.items()):
            text = f"searching {name}: {self.plan.trials} trials of at most {self.plan.seconds:g} s"
            self._phase(text, self.plan.trials)
            self._searcher(name, study, self._search_deadline(len(self.studies) - place)).go(stay=stay)

    def _enqueue(self) -> None:
        """Puts what is known into the queues. Each study keeps the list, so that a call that goes on has the same."""
        for name, study in self.studies.items():
            search = self._searcher(name, study, math.inf)
            if "starts" not in study.user_attrs:
                known = {start: search.space.drawn(setting) for start, setting in self._starts(name, search.space)}
                study.set_user_attr("starts", known)
            for start, setting in study.user_attrs["starts"].items():
                search.trials.enqueue(setting, start)

    def _starts(self, name: str, space: Space) -> Iterable[tuple[str, dict[str, Any]]]:
        if name == "kfac":
            return settings_of.starts(space, self._earlier()).items()
        return zip(ORDINALS, space.starts, strict=False)

    def _searcher(self, name: str, study: optuna.Study, deadline: float) -> Search:
        kfac = name == "kfac"
        runs = self._runs(deadline)
        space = self.space if kfac else with_horizon(SPACES[name])
        entrant = SEARCHED if kfac else ENTRANTS[name]
        trials = Trials(study, self.plan.trials)
        core = settings_of.CORE if kfac else ()
        return Search(runs, entrant, space, trials, self.plan.pruner, core, self.watch, self.worker)

    @property
    def objective(self) -> Objective:
        return Objective(self.plan.seconds, self.plan.target, self.untrained)

    def _runs(self, deadline: float) -> Runs:
        plan, objective = self.plan, self.objective
        runs = Runs(self.task, objective, plan.seed, self.device, plan.evaluations, self.compile, deadline)
        return replace(runs, ledger=self.ledger, warmed=self.warmed)

    def _search_deadline(self, searches: int) -> float:
        """When this search has had its share: those still to come get as much each, the end what it needs."""
        if math.isinf(self.deadline):
            return math.inf
        needed = self.plan.seconds * SLOWER * self._runs_at_the_end()
        last = self.deadline - min(needed, (self.deadline - self.ready) * KEPT_FOR_THE_END)
        now = time.monotonic()
        return now + max(last - now, 0.0) / searches

    def _runs_at_the_end(self) -> int:
        return len(self.studies) * LEADERS * REPEATS + (len(self.studies) + 1) * int(self.seeds)

    def _earlier(self) -> dict[str, dict[str, Any]]:
        """The best settings of other studies of the same task in this storage."""
        found = {}
        for other in optuna.get_all_study_summaries(storage=self.storage, include_best_trial=False):
            plan = other.user_attrs.get("plan", {})
            same = plan.get("task") == self.plan.task and plan.get("signature") == self.signature
            if same and other.study_name != self.name:
                trials = Trials(optuna.load_study(study_name=other.study_name, storage=self.storage), 0)
                best = _best(trials.results())
                if best:
                    found[f"study {other.study_name}"] = best[0].setting
        return found

    def _winner(self, name: str) -> tuple[Result, float] | None:
        """The leader that is best on seeds of its own, and the steps that it takes a second; None: nothing was good.

        The search's seed chose the leaders, so a lucky run there is no evidence; and of two others a bad one weighs by
        how bad it is: a leader that stalls on one of them has not won.
        """
        study = self.studies[name]
        search = self._searcher(name, study, self._last_call())
        leaders = _best(search.trials.results())[:LEADERS]
        ranked: list[tuple[float, int, Result, float]] = []
        self._phase(f"measuring {name}'s best {len(leaders)} on {REPEATS} other seeds", len(leaders) * REPEATS)
        for place, leader in enumerate(leaders):
            contender = Contender(name, search.entrant, leader.setting)
            others = []
            for seed in range(self.plan.seed + 1, self.plan.seed + 1 + REPEATS):
                label = f"{name}, leader {place + 1}, seed {seed}"
                result = self._kept(study, "leader", contender, seed, search.runs, label, late=True)
                if result is not None:
                    others.append(result)
            every = [leader, *others]
            rate = median(result.steps / max(result.seconds, 1e-9) for result in every)
            value = fmean(result.value for result in others) if others else math.inf
            ranked.append((value, place, leader, rate))
            self.note(f"{name}, leader {place + 1}: {_listed(every)}")
        if not ranked:
            return None
        _, _, winner, rate = min(ranked, key=lambda one: one[:2])
        return winner, rate

    def _last_call(self) -> float:
        """When leaders must leave the rest of the time to the held-out seeds."""
        if math.isinf(self.deadline):
            return math.inf
        last = self.plan.seconds * SLOWER * (len(self.studies) + 1) * self.seeds
        return float(max(time.monotonic(), self.deadline - last))

    def _measured(self, winners: Mapping[str, tuple[Result, float] | None]) -> dict[str, list[Result]]:
        """Held-out runs of each contender, by name, seed by seed."""
        main = self.studies["kfac"]
        runs = self._runs(self.deadline)
        contenders = list(self._contenders(winners))
        found: dict[str, list[Result]] = {contender.name: [] for contender in contenders}
        for seed in range(HELD_OUT, HELD_OUT + self.seeds):
            self._phase(f"measuring on held-out seed {seed - HELD_OUT + 1} of {self.seeds}", len(contenders))
            row = [self._kept(main, "held-out", one, seed, runs, one.name, late=True) for one in contenders]
            if None in row:
                break  # out of time: a seed that not all have run says nothing
            for contender, result in zip(contenders, row, strict=True):
                if result is not None:
                    found[contender.name].append(result)
        return found

    def _contenders(self, winners: Mapping[str, tuple[Result, float] | None]) -> Iterator[Contender]:
        yield Contender("defaults", ENTRANTS["kfac"], {})
        for name, winner in winners.items():
            if winner is not None and name == "kfac":
                yield Contender("tuned", ENTRANTS["kfac"], self._arguments(winner))
            elif winner is not None:
                yield Contender(name, ENTRANTS[name], winner[0].setting)

    def _arguments(self, winner: tuple[Result, float]) -> dict[str, Any]:
        return settings_of.arguments(winner[0].setting, self._steps(winner))

    def _steps(self, winner: tuple[Result, float]) -> int:
        """Of a run's seconds."""
        return max(1, round(winner[1] * self.plan.seconds))

    def _kept(
        self,
        study: optuna.Study,
        stage: str,
        contender: Contender,
        seed: int,
        runs: Runs,
        label: str,
        *,
        late: bool = False,
    ) -> Any:
        """A run that the study may already have; None if there is no time for it, where that may be (`late`). Whoever
        watches knows it by its `label`."""
        text = json.dumps(plain_arguments(contender.hyper), sort_keys=True)
        key = f"{stage} {contender.name} {hashlib.sha256(text.encode()).hexdigest()[:12]} {seed} {HOST}"
        if key in study.user_attrs:
            held = study.user_attrs[key]
            return Result(setting=contender.hyper, **{**held, "points": [tuple(p) for p in held["points"]]})
        if late and time.monotonic() > runs.deadline:
            return None

        def seen(point: Point, points: Sequence[Point]) -> str:
            self.watch("point", (label, point))
            return ""

        self.watch("run", (label, contender.hyper))
        try:
            result = measure(runs, contender.entrant, contender.hyper, seed, stop=seen)
        except OutOfTime:
            if late:
                return None
            raise Mistake(f"--timeout {self.asked['timeout']:g} ended before the first run of the defaults") from None
        study.set_user_attr(key, {k: v for k, v in asdict(result).items() if k != "setting"})
        self.watch("ran", (label, result))
        return result

    # ----------------------------------------------------------------------------------------------------- the result

    def _result(
        self, winners: Mapping[str, tuple[Result, float] | None], runs: Mapping[str, list[Result]]
    ) -> TunedResult:
        objective = self.objective
        winner = winners["kfac"]
        better, why = verdict(runs, objective)
        found = self._arguments(winner) if winner is not None else {}
        own: dict[str, Any] = {"likelihood": self.task.likelihood} if isinstance(self.task.likelihood, str) else {}
        if self.task.loss_scale != 1.0:
            own["loss_scale"] = self.task.loss_scale
        arguments = {**own, **found} if better else own
        finished = all(Trials(study, self.plan.trials).complete for study in self.studies.values())
        finished = finished and all(len(results) == self.seeds for results in runs.values())
        content = {
            "format": tuned.TUNED_FORMAT,
            "task": self.spec,
            "better": better,
            "verdict": why,
            "advice": self._advice(winner, runs),
            "arguments": plain_arguments(arguments),
            "steps": self._steps(winner) if winner is not None else max([r.steps for r in runs["defaults"]], default=1),
            "model": {"signature": self.signature, "parameters": self.parameters},
            "device": tuned.device_name(self.device),
            "tiles": self.tiles,
            "objective": {"seconds": objective.seconds, "target": objective.target, "metric": self.task.metric},
            "evidence": self._evidence(winners, runs, objective),
            "environment": environment.describe(self.device),
        }
        return TunedResult(arguments, better, content, self.studies["kfac"], finished)

    def _evidence(
        self, winners: Mapping[str, tuple[Result, float] | None], runs: Mapping[str, list[Result]], objective: Objective
    ) -> dict[str, Any]:
        searches = {}
        for name, study in self.studies.items():
            results = Trials(study, self.plan.trials).results()
            ended = [result.ended for result in results]
            winner = winners[name]
            searches[name] = {
                "trials": len(results),
                "ended": {kind: ended.count(kind) for kind in dict.fromkeys(ended)},
                "seconds": round(sum(result.seconds for result in results), 2),
                "setting": winner[0].setting if winner else None,
            }
        return {
            "searches": searches,
            "held_out": {name: summary(results, objective) for name, results in runs.items()},
            "seconds": self._seconds_spent(),
        }

    def _advice(self, winner: tuple[Result, float] | None, runs: Mapping[str, list[Result]]) -> list[str]:
        """What to try next, each in a line."""
        said = []
        edges = self.space.edges(winner[0].setting) if winner else {}
        for name, side in edges.items():
            value, reach = winner[0].setting[name], "lower" if side == "low" else "higher"  # type: ignore[index]
            said.append(f"{name} {value:.3g} is at the edge of its range: let --space reach {reach}")
        results = Trials(self.studies["kfac"], 0).results()
        bad = sum(result.ended in ("diverged", "failed") for result in results)
        if bad > len(results) / 3:
            said.append(f"{bad} of {len(results)} trials diverged or failed: narrow lr, damping and kl_clip in --space")
        if self.plan.target is not None and sum(result.ended == REACHED for result in results) < LEADERS:
            said.append("few trials reach the target: raise --seconds, or take a nearer target")
        values = [result.value for result in runs.get("tuned", [])]
        if self.plan.target is not None and len(values) > 1 and max(values) > 2 * min(values):
            said.append("the held-out seeds differ by more than twice: trust the range, and raise --seeds")
        return said

    def _seconds_spent(self) -> dict[str, float]:
        """Of this call: training, evaluating, preparing runs (models, warm-up), loading (libraries, the task, a first
        step on it); the rest is ours."""
        training, evaluating, wall = (
            sum(getattr(result, name) for result in self.ledger) for name in ("seconds", "evaluating", "wall")
        )
        command, loading = time.monotonic() - self.begun, self.loaded - self.begun
        spent = {
            "command": command, "training": training, "evaluating": evaluating,
            "preparing": wall - training - evaluating, "loading": loading, "tuner": command - loading - wall,
        }  # fmt: skip
        return {name: round(value, 2) for name, value in spent.items()}


def with_horizon(space: Space) -> Space:
    """A baseline's space with the end of its schedule free, as K-FAC's is."""
    first, *others = ({**start, "horizon": 1.0} for start in space.starts)
    parameters = {**space.parameters, "horizon": settings_of.KFAC_SPACE.parameters["horizon"]}
    return replace(space, parameters=parameters, first=first, others=tuple(others))


def _listed(results: Sequence[Result]) -> str:
    return ", ".join(f"{result.value:.4g}" if result.good else result.ended for result in results)


def _best(results: Sequence[Result]) -> list[Result]:
    """Good results, the best first, each setting once."""
    found: list[Result] = []
    for result in sorted((result for result in results if result.good), key=lambda one: one.value):
        if all(result.setting != other.setting for other in found):
            found.append(result)
    return found


def plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """With schedules as numbers."""
    return {name: value.as_numbers() if isinstance(value, Schedule) else value for name, value in arguments.items()}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Raises: Mistake: it can't be written; what was there is still whole."""
    tuned.check(content, str(path))
    write_json(path, dict(content), f"--out {path}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
