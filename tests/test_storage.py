"""Storages: one that is unreachable, a torn line, a full disk, killed workers; real servers serve."""

from __future__ import annotations

import errno
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from kfac_triton.tuning import storage as storage_of
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.storage import open_storage, uninterrupted
from kfac_triton.tuning.trials import Trials

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


@pytest.fixture
def spec(tmp_path) -> str:
    (tmp_path / "task.py").write_text(TASK)
    return f"{tmp_path}/task.py:factory"


def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory):
    """The URL of a server of our own, run by a user without privileges, as it demands."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    tools = found[-1].parent
    folder = Path(tmp_path_factory.mktemp("postgresql", numbered=True))
    run_as: dict = {}
    if os.geteuid() == 0:
        user = pwd.getpwnam("nobody")
        run_as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        os.chown(folder, user.pw_uid, user.pw_gid)
        for parent in folder.parents:
            if parent.stat().st_uid == 0 and parent != Path("/"):
                parent.chmod(parent.stat().st_mode | 0o011)
    base, where = folder / "base", port()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, **run_as}
    subprocess.run([tools / "initdb", "-D", base, "-U", "tuner", "-A", "trust", "--no-sync"], check=True, **quiet)
    server = subprocess.Popen(
        [tools / "postgres", "-D", base, "-p", str(where), "-k", folder, "-h", "127.0.0.1"], **quiet
    )
    url = f"postgresql://tuner@127.0.0.1:{where}/postgres"
    try:
        for _ in range(3000):
            if subprocess.run([tools / "pg_isready", "-h", "127.0.0.1", "-p", str(where)], **quiet).returncode == 0:
                break
            time.sleep(0.1)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=300)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("url", "jobs", "said"),
    [
        ("sqlite:///x.db", 2, "SQLite is for one process; take a journal file, or --jobs 1"),
        ("redis://localhost", 1, "'redis' is no kind of storage; one of path/to/file.journal"),
        ("grpc://localhost", 1, "write grpc://host:port"),
        ("sqlite:////no/such/folder/x.db", 1, "cannot be reached"),
        ("/proc/nowhere/x.journal", 1, "cannot be written"),
    ],
)
def test_a_storage_that_cannot_be_used_is_refused_in_a_line(url, jobs, said):
    with pytest.raises(Mistake) as error:
        open_storage(url, jobs)
    assert said in str(error.value) and "\n" not in str(error.value) and url.split(":")[0] in str(error.value)


def test_a_server_that_is_not_there_is_said_in_a_line_without_the_password():
    pytest.importorskip("psycopg2")
    with pytest.raises(Mistake) as error:
        open_storage(f"postgresql://me:secret@127.0.0.1:{port()}/base")
    assert "cannot be reached" in str(error.value) and "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_proxy_that_is_not_there(monkeypatch):
    pytest.importorskip("grpc")
    monkeypatch.setattr(storage_of, "SERVER_SECONDS", 0.2)
    with pytest.raises(Mistake, match="cannot be reached"):
        open_storage(f"grpc://127.0.0.1:{port()}")


def test_a_missing_driver_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymysql", None)
    with pytest.raises(Mistake, match="pip install pymysql or mysqlclient"):
        open_storage("mysql+pymysql://me@127.0.0.1/base")


def test_a_file_that_is_no_journal(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("It was a dark and stormy night.\n" * 3)
    with pytest.raises(Mistake, match="is no journal of Optuna's"):
        open_storage(str(path))
    assert path.read_text() == "It was a dark and stormy night.\n" * 3


# ------------------------------------------------------------------------------------------------------------- journal


def test_a_line_that_a_killed_process_left_torn_is_cut_away_before_the_next(tmp_path):
    path = tmp_path / "s.journal"
    study = optuna.create_study(storage=open_storage(str(path)), study_name="s")
    study.set_user_attr("whole", 1)
    with path.open("ab") as file:
        file.write(b'{"op_code":2,"worker_id":"x","study_id":0,"user_attr":{"torn')
    other = optuna.load_study(study_name="s", storage=open_storage(str(path)))
    assert other.user_attrs == {"whole": 1}
    other.set_user_attr("next", 2)
    assert optuna.load_study(study_name="s", storage=open_storage(str(path))).user_attrs == {"whole": 1, "next": 2}
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_disk_that_is_full_leaves_the_journal_readable(tmp_path, monkeypatch):
    path = tmp_path / "s.journal"
    study = optuna.create_study(storage=open_storage(str(path)), study_name="s")
    study.set_user_attr("whole", 1)

    def full(self, logs):
        with open(self._file_path, "ab") as file:
            file.write(b'{"op_code":2,"wor')
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage_of.JournalFileBackend, "append_logs", full)
        with pytest.raises(Mistake, match=r"s\.journal cannot be written: No space left on device; make room"):
            study.set_user_attr("lost", 1)
    study.set_user_attr("next", 2)
    assert optuna.load_study(study_name="s", storage=open_storage(str(path))).user_attrs == {"whole": 1, "next": 2}


def test_ctrl_c_waits_for_the_end_of_a_write(interruptible):
    done = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("written")
        done.append("never")
    assert done == ["written"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# -------------------------------------------------------------------------------------------------------- real servers


MAIN = "import sys; from kfac_triton.tuning.cli import main; raise SystemExit(main(sys.argv[1:]))"


def command(spec: str, storage: str, out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-c", MAIN,
        "run", spec, "--storage", storage, "--study", "s", "--device", "cpu", *more, "--out", str(out),
    ]  # fmt: skip


def survive(spec: str, storage: str, folder: Path, trials: int = 20) -> None:
    """A command and three workers that joined it, of which two are killed in the middle of a trial."""
    out = folder / "tuned.json"
    main = subprocess.Popen(
        command(spec, storage, out, "--trials", str(trials), "--seconds", "0.8", "--baselines", "none", "--seeds", "1",
                "--pruner", "none", "--quiet")
    )  # fmt: skip
    workers = []
    try:
        deadline = time.monotonic() + 600
        while not planned(storage) and time.monotonic() < deadline:
            time.sleep(0.2)
        workers = [subprocess.Popen(command(spec, storage, out, "--join", "--quiet")) for _ in range(3)]
        victims, killed = [worker.pid for worker in workers[:2]], {}
        study = optuna.load_study(study_name="s", storage=open_storage(storage))
        while len(killed) < 2 and time.monotonic() < deadline:
            for trial in study.get_trials(states=(TrialState.RUNNING,)):
                owner = trial.user_attrs.get("owner", {}).get("process")
                if owner in victims and owner not in killed and trial.intermediate_values:
                    os.kill(owner, signal.SIGKILL)
                    killed[owner] = trial
            time.sleep(0.02)
        assert len(killed) == 2, "both victims were at work"
        assert main.wait(timeout=600) == 0
        assert workers[2].wait(timeout=600) == 0
    finally:
        for process in (main, *workers):
            process.kill()
    results = Trials(study, trials).results()
    assert len(results) == trials and len({result.number for result in results}) == trials
    every = study.get_trials()
    for trial in killed.values():
        assert every[trial.number].state == TrialState.FAIL
        told = (TrialState.COMPLETE, TrialState.PRUNED)
        (again,) = [t for t in every if t.params == trial.params and t.state in told]
        assert again.user_attrs["attempt"] > trial.user_attrs.get("attempt", 1)
    assert not study.get_trials(states=(TrialState.RUNNING,))
    owners = {trial.user_attrs["owner"]["process"] for trial in every if "owner" in trial.user_attrs}
    assert {main.pid, workers[2].pid} <= owners
    assert json.loads(out.read_text())["evidence"]["searches"]["kfac"]["trials"] == trials


def planned(storage: str) -> bool:
    path = Path(storage)
    if "://" not in storage and not path.is_file():
        return False
    found = optuna.get_all_study_summaries(storage=open_storage(storage), include_best_trial=False)
    return any("plan" in summary.user_attrs and summary.n_trials > 0 for summary in found)


@pytest.mark.slow
def test_two_of_four_workers_are_killed_on_a_journal(spec, tmp_path):
    survive(spec, str(tmp_path / "s.journal"), tmp_path)


@pytest.mark.slow
def test_two_of_four_workers_are_killed_on_postgresql(spec, tmp_path, postgresql):
    pytest.importorskip("psycopg2")
    survive(spec, postgresql, tmp_path)


def test_a_study_through_the_grpc_proxy(tmp_path, monkeypatch):
    pytest.importorskip("grpc")
    monkeypatch.setattr(storage_of, "SERVER_SECONDS", 300.0)  # for the server to import what it needs
    where, path = port(), tmp_path / "behind.journal"
    script = (
        "import sys; from optuna.storages import run_grpc_proxy_server; "
        "from kfac_triton.tuning.storage import open_storage; "
        f"run_grpc_proxy_server(open_storage({str(path)!r}), host='127.0.0.1', port={where})"
    )
    server = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    try:
        storage = open_storage(f"grpc://127.0.0.1:{where}")
        trials = Trials(optuna.create_study(storage=storage, study_name="s"), 2)
        trials.enqueue({"x": 0.5}, "known")
        trial = trials.claim(lambda number: optuna.samplers.RandomSampler(seed=number))
        assert trial.suggest_float("x", 0, 1) == 0.5
        trials.give_back(trial)
    finally:
        server.kill()
        server.wait()
    states = [trial.state for trial in optuna.load_study(study_name="s", storage=open_storage(str(path))).trials]
    assert states == [TrialState.FAIL, TrialState.WAITING]


def test_sqlite_serves_one_process(spec, tmp_path):
    url = f"sqlite:///{tmp_path}/s.db"
    out = tmp_path / "tuned.json"
    more = ("--trials", "2", "--seconds", "0.2", "--baselines", "none", "--seeds", "1", "--quiet")
    assert subprocess.run(command(spec, url, out, *more)).returncode == 0
    assert len(Trials(optuna.load_study(study_name="s", storage=open_storage(url)), 2).results()) == 2
