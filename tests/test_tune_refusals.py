"""What kfac-tune and kfac-bench refuse before any work: one line, exit status 2, and every file as it was."""

from __future__ import annotations

import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kfac_triton.benchmarks import cli as bench
from kfac_triton.tuning import cli, problems, store
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.storage import open_storage
from kfac_triton.tuning.store import check_file, check_folder, write_text

ONE_RECORD = '{"op_code":0,"worker_id":"x","study_name":"s","directions":[1]}\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of somebody's files, in which no task may be loaded."""

    def loaded(*_: object) -> None:
        raise AssertionError("the task was loaded: that is work")

    monkeypatch.setattr(problems, "find_task", loaded)
    monkeypatch.setattr("kfac_triton.tuning.tuner.find_task", loaded)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis.txt").write_text("years of work\n")
    (tmp_path / "one-line.json").write_text('{"years": "of work"}')
    (tmp_path / "lines.json").write_text('{"years": "of work"}\n')
    (tmp_path / "list.json").write_text('["op_code"]\n')
    (tmp_path / "page.html").write_text("<!doctype html><html><head></head></html>")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (tmp_path / "zeros.bin").write_bytes(bytes(100))
    (tmp_path / "spoiled.journal").write_text(ONE_RECORD + "years of work\n")
    (tmp_path / "torn.journal").write_text(ONE_RECORD + "years of work")
    (tmp_path / "spoiled.db").write_bytes(b"SQLite format 3\0" + b"years of work" * 400)
    with sqlite3.connect(tmp_path / "recipes.db") as base:
        base.execute("CREATE TABLE recipes (name TEXT)")
    base.close()
    (tmp_path / "full").mkdir()
    (tmp_path / "link.json").symlink_to("full")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def assert_refused(
    command: str, arguments: list[str], folder: Path, capfd: pytest.CaptureFixture[str], said: str
) -> None:
    before = contents(folder)
    assert (cli if command == "kfac-tune" else bench).main(arguments) == 2
    out, complaint = capfd.readouterr()
    assert complaint.startswith(f"{command}: ") and complaint.count("\n") == 1 and not out
    assert said in complaint
    assert contents(folder) == before


NUMBERS = [
    (option, value)
    for option, values in {
        "--trials": ("0", "-1", "nan", "inf", "1e3", "10000000000000000000000"),
        "--seconds": ("0", "-1", "nan", "inf", "-inf", "1e300", "1e-300", "many"),
        "--timeout": ("0", "nan", "inf", "1e300", "1e-300"),
        "--target": ("nan", "inf", "-inf", "best", ""),
        "--jobs": ("0", "-2", "nan", "1000000"),
        "--seed": ("-1", "nan", "9998", "10000", "100000000000000000000"),
        "--seeds": ("0", "nan", "inf", "1000000000000"),
        "--fix": ("lr=nan", "lr=inf", "factor_interval=0", "inverse_interval=1e400", "factor_interval=10000000000"),
    }.items()
    for value in values
]


@pytest.mark.parametrize(("option", "value"), NUMBERS)
def test_a_number_that_cannot_be_is_refused(folder, capfd, option, value):
    said = value.partition("=")[0] if option == "--fix" else option
    assert_refused("kfac-tune", ["run", "digits", option, value], folder, capfd, said)


@pytest.mark.parametrize("name", ["", "  ", "two\nlines", "\x1b[31m", "x" * 300])
def test_a_study_has_a_name_that_can_be_printed(folder, capfd, name):
    assert_refused("kfac-tune", ["run", "digits", "--study", name], folder, capfd, "1 to 200 printable characters")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--html", "full"], "--html full cannot be written: it is a folder; name a file"),
        (["--html", "thesis.txt"], "--html thesis.txt is there and was not written by this command"),
        (["--html", "page.html"], "--html page.html is there and was not written by this command"),
        (["--html", "no/such/x.html"], "--html no/such/x.html cannot be written: No such file or directory"),
        (["--html", "/dev/null"], "--html /dev/null cannot be written: it is no regular file"),
        (["--html", ""], "it is a folder"),
        (["--out", "full"], "--out full cannot be written: it is a folder"),
        (["--out", "link.json"], "--out link.json cannot be written: it is a folder"),
        (["--out", "/dev/full"], "--out /dev/full cannot be written: it is no regular file; name a file"),
        (["--out", "pipe"], "--out pipe cannot be written: it is no regular file"),
        (["--out", "/proc/tuned.json"], "--out /proc/tuned.json cannot be written: No such file or directory"),
        (["--out", "thesis.txt/tuned.json"], "--out thesis.txt/tuned.json cannot be written: Not a directory"),
        (["--out", "x" * 240 + ".json"], "cannot be written: File name too long"),
        (["--out", "x" * 300 + ".json"], "cannot be written: File name too long"),
        (["--out", "one-line.json"], "--out one-line.json is there and is no tuned file"),
        (["--out", "tuned.html"], "is the place of two files; name three different ones"),
        (["--out", "tuned.journal"], "is the place of two files"),
        (["--html", "full/../tuned.json"], "is the place of two files"),
        (["--storage", "tuned.json"], "is the place of two files"),
        (["--storage", "sqlite:///tuned.html"], "is the place of two files"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused(folder, capfd, more, said):
    assert_refused("kfac-tune", ["run", "digits", *more], folder, capfd, said)


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("", "--storage '': name a journal file or a database"),
        ("full", "--storage full is no regular file; name another file"),
        ("/dev/full", "--storage /dev/full is no regular file"),
        ("pipe", "--storage pipe is no regular file"),
        ("thesis.txt", "--storage thesis.txt is no journal of Optuna's; name another file"),
        ("one-line.json", "is no journal"),
        ("lines.json", "is no journal"),
        ("list.json", "is no journal"),
        ("picture.png", "is no journal"),
        ("zeros.bin", "is no journal"),
        ("recipes.db", "is no journal"),
        ("spoiled.journal", "is no journal"),
        ("torn.journal", "is no journal"),
        ("journal://thesis.txt", "--storage thesis.txt is no journal"),
        ("/proc/x.journal", "--storage /proc/x.journal cannot be written: No such file or directory"),
        ("thesis.txt/x.journal", "--storage thesis.txt/x.journal cannot be written: Not a directory"),
        ("sqlite:///thesis.txt", "--storage thesis.txt is no SQLite database; name another file"),
        ("sqlite:///full", "--storage full is no regular file"),
        ("sqlite:///pipe", "--storage pipe is no regular file"),
        ("sqlite:///spoiled.db", "--storage spoiled.db is no SQLite database that can be read"),
        ("sqlite:///recipes.db", "--storage recipes.db is no database of Optuna's"),
        ("sqlite+pysqlite:///picture.png", "--storage picture.png is no SQLite database"),
    ],
)
def test_a_storage_that_holds_something_else_is_refused_and_left_alone(folder, capfd, storage, said):
    assert_refused("kfac-tune", ["run", "digits", "--storage", storage], folder, capfd, said)
    with pytest.raises(Mistake):
        open_storage(storage or "full")
    assert not (folder / "full" / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "thesis.txt"], "thesis.txt is no journal"),
        (["show", "full"], "--storage full is no regular file"),
        (["show", "sqlite:///recipes.db"], "is no database of Optuna's"),
        (["run"], "Missing argument"),
        (["run", "digits", "--trails", "3"], "No such option: --trails"),
        (["runs"], "No such command 'runs'"),
        (["kernels", "--top", "0"], "--top 0: at least 1"),
        (["kernels", "--jobs", "100000"], "--jobs 100000: at most 256"),
        (["kernels", "--top", "nan"], "--top"),
        (["kernels", "--target", "sm_90", "--out", "full"], "--out full cannot be written: it is a folder"),
        (["kernels", "--target", "sm_90", "--out", "lines.json"], "--out lines.json is there and was not written by"),
        (["kernels", "--target", "sm_90", "--out", "/dev/full"], "--out /dev/full cannot be written"),
    ],
)
def test_the_other_commands_refuse_too(folder, capfd, arguments, said):
    assert_refused("kfac-tune", arguments, folder, capfd, said)


@pytest.mark.parametrize("html", ["full", "thesis.txt", "/dev/full"])
def test_show_writes_its_report_over_nothing_else(folder, capfd, html):
    (folder / "s.journal").write_text(ONE_RECORD)
    assert_refused("kfac-tune", ["show", "s.journal", "--html", html], folder, capfd, f"--html {html}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        *[
            (["run", "digits", option, value], option)
            for option, values in {
                "--seeds": ("0", "nan", "1000000000000"),
                "--trials": ("0", "inf", "1000000000000"),
                "--seconds": ("nan", "inf", "1e300", "0", "1e-300"),
                "--tuning-seconds": ("nan", "inf", "1e300"),
                "--budget": ("nan", "inf", "1e300", "-1"),
                "--threads": ("0", "-1", "1000000"),
            }.items()
            for value in values
        ],
        *[
            (["step", "digits", option, value], option)
            for option, values in {
                "--factor-interval": ("0", "nan", "1000000000000"),
                "--inverse-interval": ("0", "inf", "1000000000000"),
                "--factor-fraction": ("nan", "inf", "0", "1.5"),
                "--batch": ("0", "-1", "1000000000000"),
                "--chunks": ("-1", "1000000000000"),
                "--chunk": ("0", "1000000000000"),
                "--threads": ("0", "-1", "1000000"),
            }.items()
            for value in values
        ],
        (["step", "digits", "--optimizers", "sgd,lion"], "unknown optimizer 'lion'"),
        *[(["kernels", "--seconds", value], "--seconds") for value in ("nan", "inf", "-1", "1e300")],
        *[
            (["rival", option, value], option)
            for option, values in {
                "--seconds": ("nan", "inf", "0"),
                "--grid-seconds": ("nan", "1e300"),
                "--grid": ("nan", "1e-3,inf", "0", "x"),
                "--seeds": ("0", "1000000000000"),
                "--best-known": ("nan", "inf"),
                "--threads": ("-1",),
                "--out": ("thesis.txt", "/dev/full"),
            }.items()
            for value in values
        ],
        (["run", "digits", "--out", "/dev/full"], "--out /dev/full is a file; name a folder"),
        (["run", "digits", "--out", "/proc/x"], "--out /proc/x cannot be written: No such file or directory"),
        (["run", "digits", "--out", "thesis.txt/x"], "--out thesis.txt/x cannot be written: Not a directory"),
        (["kernels", "--out", "thesis.txt"], "--out thesis.txt is a file"),
        (["report", "thesis.txt"], "holds no kfac-bench run"),
        (["run", "digits", "--no-such-option"], "No such option: --no-such-option"),
    ],
)
def test_the_benchmarks_refuse_too(folder, capfd, arguments, said):
    assert_refused("kfac-bench", arguments, folder, capfd, said)


# ---------------------------------------------------------------------------------------------------------------- parts


def test_what_is_ours_passes_the_checks_and_is_not_touched(folder):
    ours = folder / "ours.html"
    ours.write_text(store.REPORT_BEGINS + "x")
    (folder / "empty.html").touch()
    before, stamp = contents(folder), ours.stat().st_mtime_ns
    for name in ("ours.html", "new.html"):
        check_file("--html", folder / name, lambda content: content.startswith(store.REPORT_BEGINS.encode()))
    check_folder("--out", folder / "a" / "b")
    check_folder("--out", folder)
    assert contents(folder) == before and ours.stat().st_mtime_ns == stamp


def test_many_may_look_at_one_place_at_once(folder):
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: (check_file("--out", Path("x.json")), check_folder("--out", folder)), range(300)))


def test_a_disk_that_is_full_is_seen_before_the_work(folder, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = contents(folder)
    monkeypatch.setattr(store.os, "fsync", full)
    for check, name in ((check_file, "tuned.json"), (check_folder, "report")):
        with pytest.raises(Mistake, match=f"--out {name} cannot be written: No space left on device"):
            check("--out", Path(name))
    assert contents(folder) == before


def test_a_link_stays_a_link_and_what_it_points_to_is_written(folder):
    (folder / "real.json").write_text("old")
    (folder / "again.json").symlink_to("real.json")
    write_text(Path("again.json"), "new")
    assert (folder / "again.json").is_symlink() and (folder / "real.json").read_text() == "new"


def test_a_file_that_cannot_be_written_keeps_what_it_had(folder, monkeypatch):
    before = contents(folder)
    with pytest.raises(Mistake, match=r"thesis.txt/x cannot be written: (Not a directory|File exists); make room or"):
        write_text(Path("thesis.txt/x"), "new")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(Mistake, match=r"--out thesis.txt cannot be written: No space left on device"):
        write_text(Path("thesis.txt"), "new", "--out thesis.txt")
    assert contents(folder) == before
