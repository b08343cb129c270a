"""Loading a task: built-in names, files, modules, and what is said when that fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kfac_triton.tuning
from kfac_triton.tuning import Task
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.problems import find_task
from kfac_triton.tuning.task import load_user_task

GOOD = """
import torch
from kfac_triton.tuning import Task
from beside import WIDTH

def factory():
    return Task(
        model=lambda: torch.nn.Linear(WIDTH, 1),
        batches=lambda seed: iter([(torch.ones(4, WIDTH), torch.zeros(4, 1))]),
        loss=torch.nn.functional.mse_loss,
        likelihood="gaussian",
        target=0.5,
    )

def unlikely():
    task = factory()
    return Task(task.model, task.batches, task.loss, "poisson")

def wrong():
    return 3

def broken():
    raise RuntimeError("no luck")

number = 5
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("WIDTH = 7\n")
    path = tmp_path / "my_task.py"
    path.write_text(GOOD)
    return path


def test_the_public_name_is_the_class_of_the_module() -> None:
    assert kfac_triton.tuning.Task is Task
    assert Task.__module__ == "kfac_triton.tuning.task"


def test_a_file_is_loaded_with_what_lies_beside_it(file: Path) -> None:
    task = find_task(f"{file}:factory")
    assert task.model().in_features == 7
    assert task.target == 0.5 and task.evaluate is None
    assert task.name == f"{file}:factory"
    assert len(task.data[0]["digest"]) == 64


def test_a_changed_file_has_another_digest(file: Path) -> None:
    before = load_user_task(f"{file}:factory").data
    file.write_text(GOOD + "\n# changed\n")
    assert load_user_task(f"{file}:factory").data != before


def test_a_module_is_loaded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(file.parent))
    assert load_user_task("my_task:factory").model().in_features == 7


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("missing", "has no callable 'missing'; it defines broken, factory, unlikely, wrong"),
        ("number", "has no callable 'number'"),
        ("wrong", "returned int; return kfac_triton.tuning.Task"),
        ("broken", "RuntimeError: no luck"),
        ("unlikely", "likelihood must be \"categorical\", .*; got 'poisson'"),
    ],
)
def test_a_bad_factory_is_named(file: Path, factory: str, said: str) -> None:
    with pytest.raises(Mistake, match=said):
        load_user_task(f"{file}:{factory}")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nowhere/task.py:factory", "there is no file"),
        ("no_such_module_anywhere:factory", "does not import: ModuleNotFoundError"),
        ("digits2", "unknown task 'digits2': built in are digits, digits-autoencoder, curves, mnist"),
        ("task.py:", "write path/to/file.py:factory"),
    ],
)
def test_a_bad_name_is_explained(spec: str, said: str) -> None:
    with pytest.raises(Mistake, match=said):
        find_task(spec)


def test_a_file_that_does_not_import_is_explained_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("import torch\nimport a_package_nobody_has\n")
    with pytest.raises(Mistake, match="does not import: ModuleNotFoundError") as raised:
        load_user_task(f"{path}:factory")
    assert "\n" not in str(raised.value)


def test_six_arguments_are_positional_and_the_rest_are_not() -> None:
    linear = torch.nn.Linear(1, 1)
    task = Task(lambda: linear, lambda seed: iter(()), torch.nn.functional.mse_loss, "gaussian", None, 1.0)
    assert task.target == 1.0
    with pytest.raises(TypeError):
        Task(lambda: linear, lambda seed: iter(()), torch.nn.functional.mse_loss, "gaussian", None, 1.0, "name")  # type: ignore[misc]
