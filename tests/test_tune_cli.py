"""The command kfac-tune as a user has it: run, tasks, show; what goes wrong is one line and exit status 2."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kfac_triton import load_tuned
from kfac_triton.tuning import cli, commands, search

FILE = """
import torch
from kfac_triton.tuning import Task
from torch.nn import functional as F

def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(64, 6, generator=generator)
        yield x, (x[:, 0] * x[:, 1] > 0).long()

def model():
    return torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 2))

def made(**change):
    return Task(**{**dict(model=model, batches=batches, loss=F.cross_entropy, likelihood="categorical"), **change})

def factory():
    return made()

ONCE = []

def once_model():
    ONCE.append(1)
    if len(ONCE) > 1:
        raise RuntimeError("the weights file is locked")
    return model()

def once(): return made(model=once_model)

SAME = model()

def same(): return made(model=lambda: SAME)
def no_module(): return made(model=lambda: "net")
def no_batch(): return made(batches=lambda seed: iter(()))
def broken_batch(): return made(batches=lambda seed: 1 / 0)
def no_pair(): return made(batches=lambda seed: iter([torch.ones(3)]))
def vector(): return made(loss=lambda o, t: F.cross_entropy(o, t, reduction="none"))
def no_tensor(): return made(loss=lambda o, t: 1.0)
def broken_loss(): return made(loss=lambda o, t: o.missing)
def nan_loss(): return made(loss=lambda o, t: F.cross_entropy(o, t) * float("nan"))
def nan_data(): return made(batches=lambda seed: iter([(torch.full((64, 6), float("nan")), torch.zeros(64).long())]))
def explodes(): return made(loss=lambda o, t: (o * 1e30).square().sum())
def nan_metric(): return made(evaluate=lambda net: float("nan"))
def broken_metric(): return made(evaluate=lambda net: net.missing)
def returns_none(): return None
def raises(): raise KeyError("path")
def wrong_likelihood(): return made(likelihood="poisson")

LEFT = iter([batch for batch, _ in zip(batches(0), range(9))])

def ends(): return made(batches=lambda seed: LEFT, evaluate=lambda net: 1.0)

not_callable = 3
"""

MAIN = "import sys; from kfac_triton.tuning.cli import main; raise SystemExit(main(sys.argv[1:]))"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "task.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small(*more: str, task: str = "task.py:factory") -> list[str]:
    quick = ["--trials", "2", "--seconds", "0.1", "--seeds", "1", "--baselines", "none", "--device", "cpu"]
    return ["run", task, *quick, *more]


def test_a_run_writes_the_file_the_report_and_the_journal_and_says_what_it_found(folder, capfd):
    assert cli.main(small("--baselines", "sgd", "--seeds", "2")) == 0
    said = capfd.readouterr()
    assert said.out.splitlines()[-1] == "tuned.json"
    assert "held-out seeds" in said.out and "kfac: 2 trials" in said.out and "sgd: 2 trials" in said.out
    assert re.search(r"\[ +\d+\.\d s\] trial 0: .* \(the defaults\)", said.err), "plain lines where no terminal is"
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith("tuned")) == [
        "tuned.html", "tuned.journal", "tuned.json"
    ]  # fmt: skip
    load_tuned("tuned.json")
    content = json.loads(Path("tuned.json").read_text())
    assert content["task"] == "task.py:factory" and content["verdict"] in said.out.replace("\n", " ")


class _References(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href") and value]


def test_the_report_is_one_file_that_needs_nothing_else(folder):
    assert cli.main([*small("--quiet", "--trials", "6", "--seconds", "0.05")]) == 0
    page = Path("tuned.html").read_text()
    parser = _References()
    parser.feed(page)
    assert not [reference for reference in parser.found if not reference.startswith(("data:", "#"))]
    for title in ("History", "Curves of the best", "What was pruned when", "Timeline"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("Plotly.newPlot") >= 4
    assert json.loads(Path("tuned.json").read_text())["verdict"].split(":")[0] in page


def test_json_and_quiet(folder, capfd):
    assert cli.main(small("--json")) == 0
    said = capfd.readouterr()
    assert json.loads(said.out) == json.loads(Path("tuned.json").read_text()) and not said.err
    assert cli.main(small("--quiet")) == 0
    said = capfd.readouterr()
    assert said.out == "tuned.json\n" and not said.err


def test_the_same_command_goes_on_and_does_nothing_twice(folder, capfd, monkeypatch):
    assert cli.main(small("--quiet")) == 0
    first, trained = json.loads(Path("tuned.json").read_text()), []
    monkeypatch.setattr(search, "train", lambda *arguments, **options: trained.append(arguments))
    assert cli.main(small("--quiet")) == 0
    assert not trained
    again = json.loads(Path("tuned.json").read_text())
    assert again["evidence"]["held_out"] == first["evidence"]["held_out"]


def test_two_processes(folder, capfd):
    assert cli.main(small("--trials", "6", "--seconds", "0.5", "--jobs", "2")) == 0
    assert "kfac: 6 trials" in capfd.readouterr().out


def test_tasks_are_listed(capfd):
    assert cli.main(["tasks"]) == 0
    said = capfd.readouterr().out
    assert "curves" in said and "fashion-cnn" in said and "Two strided convolutions" in said


def test_show_prints_a_tuned_file_a_study_and_writes_its_report(folder, capfd):
    cli.main(small("--baselines", "sgd", "--quiet"))
    capfd.readouterr()
    assert cli.main(["show", "tuned.json"]) == 0
    said = capfd.readouterr().out
    assert "task.py:factory: K-FAC's arguments" in " ".join(said.split()) and "held-out seeds" in said
    assert cli.main(["show", "tuned.journal"]) == 0
    said = capfd.readouterr().out
    assert "task.py:factory/sgd" in said and "trials" in said
    assert cli.main(["show", "tuned.journal", "--study", "task.py:factory", "--html", "again.html"]) == 0
    said = capfd.readouterr().out
    assert "the defaults" in said and "falling" in said and "again.html" in said
    assert "<h2>History</h2>" in Path("again.html").read_text()


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("nowhere.py:factory", "there is no file nowhere.py"),
        ("task.py:missing", "has no callable 'missing'"),
        ("task.py:not_callable", "has no callable 'not_callable'"),
        ("task.py:returns_none", "returned NoneType; return kfac_triton.tuning.Task(...)"),
        ("task.py:raises", "raises() failed: KeyError: 'path'"),
        ("task.py:wrong_likelihood", "poisson"),
        ("task.py:once", "the second call of model() failed: RuntimeError: the weights file is locked"),
        ("task.py:same", "model() returned the same module twice; build a new one at every call"),
        ("task.py:no_module", "model() returned str; return a torch.nn.Module"),
        ("task.py:no_batch", "batches(0) ends before its first batch"),
        ("task.py:broken_batch", "batches(0) failed: ZeroDivisionError"),
        ("task.py:no_pair", "yields Tensor; yield pairs (inputs, targets)"),
        ("task.py:vector", "returned a tensor of shape (64,); return a scalar"),
        ("task.py:no_tensor", "returned float; return a scalar"),
        ("task.py:broken_loss", "loss(outputs, targets) failed on the first batch: AttributeError"),
        ("task.py:nan_loss", "the loss of the untrained model on the first batch is nan"),
        ("task.py:nan_data", "the loss of the untrained model on the first batch is nan"),
        ("task.py:explodes", "the loss of the untrained model on the first batch is inf"),
        ("task.py:nan_metric", "evaluate(model) is nan for the untrained model"),
        ("task.py:broken_metric", "evaluate(model) failed: AttributeError"),
        ("task.py:ends", "yields nothing after"),
        ("unheard-of", "unknown task 'unheard-of'"),
    ],
)
def test_what_is_wrong_with_a_task_is_one_line(folder, capfd, task, said):
    assert cli.main(small("--quiet", task=task)) == commands.MISTAKE == 2
    complaint = capfd.readouterr().err
    assert said in complaint and complaint.startswith("kfac-tune: ") and complaint.count("\n") == 1
    assert not Path("tuned.json").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--trials", "0"], "--trials 0: at least 1"),
        (["--quiet", "--json"], "--quiet with --json: one of them"),
        (["--storage", "sqlite:///x.db", "--jobs", "2"], "SQLite is for one process"),
        (["--storage", "redis://x"], "'redis' is no kind of storage"),
        (["--join"], "--join: needs the study's --storage"),
        (["--join", "--storage", "empty.journal"], "there is no study 'task.py:factory' in empty.journal"),
        (["--out", "no/such/folder/tuned.json"], "--out no/such/folder/tuned.json cannot be written"),
        (["--out", "."], "cannot be written"),
        (["--out", "task.py"], "--out task.py is there and is no tuned file"),
        (["--space", "nowhere.yaml"], "--space nowhere.yaml cannot be read"),
        (["--fix", "lr_rule=adaptive", "--fix", "lr=1"], "counts only where lr_rule is fixed"),
        (["--baselines", "lion"], "--baselines lion: among sgd, nesterov, adamw, soap, kfac-adaptive, or none"),
        (["--pruner", "asha"], "--pruner asha: one of"),
        (["--target", "best"], "--target best: a number, or defaults"),
        (["--device", "cuda:7"], "no such device"),
        (["--timeout", "0"], "--timeout 0: a positive number"),
    ],
)
def test_what_is_wrong_with_an_option_is_one_line(folder, capfd, more, said):
    assert cli.main(small(*more)) == 2
    complaint = capfd.readouterr().err.splitlines()
    assert said in complaint[-1] and complaint[-1].startswith("kfac-tune: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.json"], "nowhere.json cannot be read"),
        (["nowhere.journal"], "there is no such file"),
        (["task.py"], "is no journal"),
        (["tuned.journal", "--study", "x"], "--study x: there are task.py:factory"),
        (["tuned.json", "--study", "x"], "--study and --html go with a storage"),
    ],
)
def test_show_says_what_is_wrong_in_one_line(folder, capfd, arguments, said):
    cli.main(small("--quiet"))
    capfd.readouterr()
    assert cli.main(["show", *arguments]) == 2
    complaint = capfd.readouterr().err
    assert said in complaint and complaint.count("\n") == 1


def test_another_study_is_not_overwritten(folder, capfd):
    assert cli.main(small("--quiet")) == 0
    before = Path("tuned.journal").read_bytes(), Path("tuned.json").read_bytes()
    assert cli.main(small("--quiet", "--target", "0.5")) == 2
    assert "target None there, 0.5 here" in capfd.readouterr().err
    assert (Path("tuned.journal").read_bytes(), Path("tuned.json").read_bytes()) == before


def test_what_was_tuned_for_another_task_is_not_overwritten(folder, capfd):
    assert cli.main(small("--quiet")) == 0
    before = Path("tuned.json").read_bytes()
    capfd.readouterr()
    assert cli.main(small("--quiet", "--storage", "other.journal", task="task.py:ends")) == 2
    assert "--out tuned.json holds what was tuned for task.py:factory; name another file" in capfd.readouterr().err
    assert Path("tuned.json").read_bytes() == before


def test_a_disk_that_fills_leaves_the_old_file_whole(folder, capfd):
    """Writes beyond some kilobytes fail, as on a full disk; the journal, which comes first, is out of their reach."""
    assert cli.main(small("--quiet")) == 0
    before = Path("tuned.json").read_bytes()

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))

    script = (
        "from pathlib import Path; from kfac_triton.tuning.tuner import write; from kfac_triton import tuned; "
        "content = tuned.read_tuned(Path('tuned.json')); content['verdict'] = 'x' * 4000; "
        "write(Path('tuned.json'), content)"
    )
    ended = subprocess.run([sys.executable, "-c", script], preexec_fn=limited, capture_output=True, text=True)
    assert ended.returncode == 1 and "--out tuned.json cannot be written: File too large" in ended.stderr
    assert Path("tuned.json").read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.endswith(".part")]


@pytest.mark.slow
def test_a_journal_that_cannot_grow_is_said_in_a_line(folder):
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    command = [sys.executable, "-c", MAIN, *small("--quiet")]
    ended = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "tuned.journal cannot be written: File too large" in ended.stderr and ended.stderr.count("\n") == 1
    assert subprocess.run(command, capture_output=True).returncode == 0, "with room again it goes on"


def test_ctrl_c_ends_the_write_says_how_it_stands_and_how_to_go_on(folder, interruptible):
    arguments = small("--trials", "40", "--seconds", "0.4", "--pruner", "none")
    running = subprocess.Popen([sys.executable, "-c", MAIN, *arguments], stderr=subprocess.PIPE, text=True)
    for line in running.stderr:
        if "trial 2:" in line:
            break
    running.send_signal(signal.SIGINT)
    said = running.stderr.read()
    assert running.wait(timeout=300) == commands.INTERRUPTED == 130
    assert re.search(r"kfac-tune: interrupted; kfac: \d+ of 40 trials, best [\d.]+ in trial \d", said)
    assert "the same command goes on" in said and "Traceback" not in said
    assert not Path("tuned.json").exists()
    fewer = small("--trials", "4", "--seconds", "0.4", "--pruner", "none", "--quiet")
    assert cli.main(fewer) == 0


def test_a_live_table_on_a_terminal(folder):
    """On a pseudo terminal: the table is drawn, with the current curve, and gone at the end."""
    main, child = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-c", MAIN, *small("--trials", "2", "--seconds", "2")], stdout=child, stderr=child,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(child)
    said = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:
            break
        if not part:
            break
        said += part
    os.close(main)
    assert running.wait(timeout=300) == 0
    text = said.decode(errors="replace")
    assert "1 running" in text and "best" in text and re.search("[▁▂▃▄▅▆▇█]{3}", text)
