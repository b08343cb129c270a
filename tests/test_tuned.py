"""Tuned files: what is read is what was written, and what is for something else is warned of or refused."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from kfac_triton import KFAC, load_tuned, tuned
from kfac_triton.schedules import Cosine, Exponential, Linear, StepWise, WarmUp, restored, stretched
from kfac_triton.version import __version__


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def content(**change) -> dict:
    held = {
        "format": tuned.TUNED_FORMAT,
        "task": "task.py:factory",
        "better": True,
        "verdict": "better",
        "advice": ["raise --seconds"],
        "arguments": {
            "likelihood": "categorical", "lr": WarmUp(5, Cosine(0.1, 0.001, 95)).as_numbers(), "momentum": 0.9,
            "damping": Exponential(1e-2, 1e-3, 100).as_numbers(), "kl_clip": 1e-2, "inverse_interval": 20,
        },
        "steps": 100,
        "model": {"signature": tuned.signature(model()), "parameters": 23},
        "device": "cpu",
        "tiles": None,
        "objective": {"seconds": 6.0, "target": 0.1, "metric": "loss"},
        "evidence": {"searches": {}, "held_out": {}, "seconds": {}},
        "environment": {"kfac_triton": __version__},
    }  # fmt: skip
    return {**held, **change}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "tuned.json"


def written(path: Path, **change) -> Path:
    path.write_text(json.dumps(content(**change)))
    return path


def test_the_arguments_are_for_kfac(path, caplog):
    net = model()
    with caplog.at_level(logging.WARNING), KFAC(net, compile=False, **load_tuned(written(path))) as optimizer:
        group = optimizer.param_groups[0]
        lrs = []
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(torch.ones(8, 4)), torch.zeros(8, dtype=torch.long)).backward()
            optimizer.step()
            lrs.append(group["lr"])
    assert lrs == pytest.approx([0.02, 0.04, 0.06])
    assert group["inverse_interval"] == 20 and group["momentum"] == 0.9 and not caplog.records


def test_schedules_stretch_to_the_steps_of_the_training_to_come(path):
    arguments = load_tuned(written(path), steps=1000)
    assert arguments["lr"] == WarmUp(50, Cosine(0.1, 0.001, 950))
    assert arguments["damping"] == Exponential(1e-2, 1e-3, 1000)
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        load_tuned(path, steps=0)


@pytest.mark.parametrize("schedule", [Linear(1.0, 0.1, 10), StepWise(1.0, 0.1, (5, 10)), WarmUp(4, Linear(1.0, 0, 6))])
def test_a_stretched_schedule_has_the_same_shape(schedule):
    longer = restored(stretched(schedule.as_numbers(), 7.0))
    for step in range(12):
        if not isinstance(schedule, WarmUp) or step >= 4:
            assert longer(7 * step) == pytest.approx(schedule(step))
    assert longer.peak == schedule.peak


def test_another_model_is_refused_where_it_is_known_and_warned_of_where_not(path, caplog):
    other = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"tuned for another model \(23 parameters, here 10\); run kfac-tune for this"):
        load_tuned(written(path), other)
    with caplog.at_level(logging.WARNING), KFAC(other, compile=False, **load_tuned(path)):
        pass
    assert "was tuned for another model (23 parameters)" in caplog.text


def test_a_wrapped_model_is_the_same_model(path, caplog):
    wrapped = nn.DataParallel(model())
    with caplog.at_level(logging.WARNING), KFAC(wrapped, compile=False, **load_tuned(written(path), wrapped)):
        pass
    assert not caplog.records


def test_a_signature_is_of_names_and_shapes_alone():
    net = model()
    before = tuned.signature(net)
    with torch.no_grad():
        net[0].weight.zero_()
    net[0].weight.requires_grad_(False)
    assert tuned.signature(net.double()) == before == tuned.signature(copy.deepcopy(net))
    assert tuned.signature(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))) != before
    assert tuned.signature(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))) != before


def test_another_device_or_version_is_warned_of(path, caplog):
    written(path, device="NVIDIA H100 80GB HBM3", environment={"kfac_triton": "0.0.1"})
    with caplog.at_level(logging.WARNING), KFAC(model(), compile=False, **load_tuned(path)):
        pass
    assert "was tuned with kfac-triton 0.0.1, and this is" in caplog.text
    assert "was tuned on NVIDIA H100 80GB HBM3, and the model is on cpu" in caplog.text


def test_tiles_that_are_not_there_are_warned_of(path, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("KFAC_CACHE", str(tmp_path))
    written(path, tiles="tiles-x.json")
    load_tuned(path)
    assert "tuned with the tiles in tiles-x.json, which is not in" in caplog.text
    caplog.clear()
    (tmp_path / "tiles-x.json").write_text("{}")
    load_tuned(path)
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "kfac-triton tuned 9"}, "no tuned file of this version ('kfac-triton tuned 1')"),
        ({"format": "kfac-triton tiles 1"}, "its format is 'kfac-triton tiles 1'"),
        ({"steps": 0}, "steps: 0 is less than the minimum"),
        ({"more": 1}, "Additional properties are not allowed ('more' was unexpected)"),
        ({"arguments": {"lr": "fast"}}, "arguments.lr: 'fast' is not valid"),
        ({"arguments": {"speed": 1}}, "'speed' was unexpected"),
        ({"arguments": {"lr": {"kind": "Cosine", "start": 1}}}, "arguments.lr: no schedule"),
        ({"arguments": {"lr": {"kind": "os.system"}}}, "arguments.lr"),
        ({"arguments": {"inverse_interval": 2.5}}, "arguments.inverse_interval: 2.5 is not of type 'integer'"),
        ({"model": {"signature": "x", "parameters": 1}}, "model.signature: 'x' does not match"),
        ({"better": "yes"}, "better: 'yes' is not of type 'boolean'"),
    ],
)
def test_a_file_that_is_none_is_refused_with_the_place(path, change, said):
    written(path, **change)
    with pytest.raises(ValueError) as error:
        load_tuned(path)
    assert said in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}'])
def test_a_damaged_file_is_refused(path, text):
    path.write_text(text)
    with pytest.raises(ValueError, match=r"cannot be read|is no file of kfac-tune's"):
        load_tuned(path)


def test_every_argument_of_the_schema_is_one_of_kfacs(path):
    import inspect

    schema = json.loads((Path(tuned.__file__).parent / "tuned.schema.json").read_text())
    named = set(schema["$defs"]["arguments"]["properties"])
    assert named <= set(inspect.signature(KFAC.__init__).parameters)
