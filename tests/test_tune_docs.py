"""The tutorial in docs/tuning.md, word for word: a user's own script, a factory of a few lines, a tuned transformer."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

import pytest

from kfac_triton.tuning import cli
from kfac_triton.tuning.task import load_user_task

DOCUMENT = Path(__file__).parents[1] / "docs" / "tuning.md"
LONGEST = 15


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    data = os.environ.get("KFAC_DATA")
    if not data or not (Path(data) / "tinyshakespeare" / "input.txt").is_file():
        pytest.skip("needs tinyshakespeare/input.txt in $KFAC_DATA")
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)
    chosen = [block for block in blocks if "class Shakespeare" in block or block.startswith("def factory")]
    assert len(chosen) == 2
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "shakespeare.py"
    path.write_text("\n\n".join(chosen))
    return path


def test_the_factory_is_as_short_as_promised(script):
    text = script.read_text()
    factory = next(node for node in ast.parse(text).body if getattr(node, "name", "") == "factory")
    assert factory.end_lineno - factory.lineno + 1 <= LONGEST
    without = text.replace("\n".join(text.splitlines()[factory.lineno - 1 : factory.end_lineno]), "")
    assert "kfac" not in without.lower().replace("kfac_data", ""), "the rest is the user's own"


def test_its_batches_are_the_text_and_its_next_letters(script):
    inputs, targets = next(load_user_task("shakespeare.py:factory").batches(0))
    assert inputs.shape == targets.shape == (32, 32) and (inputs[:, 1:] == targets[:, :-1]).all()


def test_the_transformer_is_tuned(script, capfd):
    command = ["run", "shakespeare.py:factory", "--seconds", "0.6", "--target", "defaults"]
    few = ["--trials", "4", "--seeds", "1", "--baselines", "adamw", "--device", "cpu", "--quiet"]
    assert cli.main([*command, *few]) == 0
    assert capfd.readouterr().out == "tuned.json\n"
    content = json.loads(Path("tuned.json").read_text())
    assert content["evidence"]["searches"]["kfac"]["trials"] == content["evidence"]["searches"]["adamw"]["trials"] == 4
    assert content["objective"]["target"] > 0 and "held_out" in content["evidence"]


def test_its_commands_are_the_commands_there_are(capsys):
    """Every option of kfac-tune in the document is one of the command's."""
    for name in ("run", "show"):
        assert cli.main([name, "--help"]) == 0
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", DOCUMENT.read_text()))
    assert named <= known
