"""Rivals under the same clock, played by fakes: what each is built from, and what is said of those that don't run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from kfac_triton.benchmarks import cli, step_rivals
from kfac_triton.benchmarks.step import Lane, StepOptions, interleave, kept_batches
from kfac_triton.benchmarks.step_rivals import Unsuitable, chain_of, jax_loss, rival_lanes
from kfac_triton.tuning.problems import find_task
from kfac_triton.tuning.task import Task

CPU = torch.device("cpu")
OPTIONS = StepOptions(("sgd",), factor_interval=2, inverse_interval=4, chunk=4, batch=8, chunks=1, compile=False)


class Soap(torch.optim.AdamW):
    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, parameters: Any, **options: Any) -> None:
        self.made.append(options)
        super().__init__(parameters, lr=options["lr"])


class GradientMaker:
    """ASDL's protocol: the loss of a factor update is a sum, the gradient a mean."""

    made: ClassVar[list[Any]] = []

    def __init__(self, model: nn.Module, config: Any, fisher_type: str) -> None:
        self.made.append((config, fisher_type))
        self.config, self.steps = config, 0

    def setup_model_call(self, model: nn.Module, inputs: Any) -> Any:
        self.outputs = model(inputs)
        return self.outputs

    def setup_loss_call(self, loss: Any, outputs: Any, targets: Any) -> None:
        self.loss = loss, targets

    def forward_and_backward(self) -> None:
        loss, targets = self.loss
        mean = loss(self.outputs, targets)
        if self.steps % self.config.curvature_upd_interval == 0:
            assert loss(self.outputs, targets, reduction="sum") == self.config.data_size * mean
        mean.backward()
        self.steps += 1


class JaxOptimizer:
    made: ClassVar[list[dict[str, Any]]] = []
    steps = 0

    def __init__(self, value_and_grad_func: Any, **options: Any) -> None:
        self.made.append(options)
        self.value = value_and_grad_func

    def init(self, parameters: Any, key: Any, batch: Any) -> int:
        return 0

    def step(self, parameters: Any, state: int, key: Any, batch: Any) -> Any:
        JaxOptimizer.steps += 1
        return parameters, state + 1, {"loss": self.value(parameters, batch)}


def module(name: str, **names: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(names)
    return made


JNP = module("jax.numpy", asarray=np.asarray, sum=np.sum, tanh=np.tanh, take_along_axis=np.take_along_axis)
NN = SimpleNamespace(
    softplus=lambda x: np.logaddexp(x, 0),
    sigmoid=lambda x: 1 / (1 + np.exp(-x)),
    relu=lambda x: np.maximum(x, 0),
    log_softmax=lambda x: x - np.log(np.exp(x).sum(axis=-1, keepdims=True)),
)
JAX = module(
    "jax", numpy=JNP, nn=NN, random=SimpleNamespace(PRNGKey=lambda seed: seed), value_and_grad=lambda f: f,
    block_until_ready=lambda x: x,
)  # fmt: skip
KFAC_JAX = module("kfac_jax", Optimizer=JaxOptimizer)
for distribution in ("multi_bernoulli", "normal", "categorical"):
    setattr(KFAC_JAX, f"register_{distribution}_predictive_distribution", lambda z, targets: None)
FAKES = {
    "pytorch_optimizer": module("pytorch_optimizer", SOAP=Soap),
    "asdl": module("asdl", KfacGradientMaker=GradientMaker, PreconditioningConfig=SimpleNamespace),
    "jax": JAX, "jax.numpy": JNP, "kfac_jax": KFAC_JAX,
}  # fmt: skip


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fake in FAKES.items():
        monkeypatch.setitem(sys.modules, name, fake)
    for kind in (Soap, GradientMaker, JaxOptimizer):
        monkeypatch.setattr(kind, "made", [])
    monkeypatch.setattr(JaxOptimizer, "steps", 0)
    monkeypatch.setattr(step_rivals, "before_import", lambda threads: None)


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FAKES:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(step_rivals, "before_import", lambda threads: None)


def lanes(name: str, options: StepOptions = OPTIONS) -> tuple[list[Lane], list[str]]:
    task = find_task(name)
    return rival_lanes(task, options, kept_batches(task, options), CPU)


def test_all_three_take_steps_with_our_intervals(installed: None) -> None:
    found, notes = lanes("chain-2x4")
    assert [lane.name for lane in found] == ["SOAP", "ASDL", "kfac-jax"] and not notes
    assert Soap.made[0]["precondition_frequency"] == 4
    config, fisher = GradientMaker.made[0]
    assert (config.curvature_upd_interval, config.preconditioner_upd_interval, config.data_size) == (2, 4, 8)
    assert fisher == "fisher_emp"
    options = JaxOptimizer.made[0]
    assert (options["curvature_update_period"], options["inverse_update_period"]) == (2, 4)
    assert JaxOptimizer.steps == 4, "a first chunk"
    costs = interleave(found, OPTIONS)
    assert JaxOptimizer.steps == 8 and [cost.optimizer for cost in costs] == ["SOAP", "ASDL", "kfac-jax"]


def test_an_optimizer_of_ours_is_no_rival_too(installed: None) -> None:
    found, _ = lanes("chain-2x4", StepOptions(("sgd", "soap"), batch=8))
    assert [lane.name for lane in found] == ["ASDL", "kfac-jax"]


def test_those_not_installed_are_named_in_one_line(absent: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert lanes("chain-2x4") == (
        [],
        [
            "rivals that are not installed: SOAP (pip install pytorch_optimizer), ASDL (pip install --pre asdfghjkl), "
            "kfac-jax (pip install jax==0.8.3 jaxlib==0.8.3 kfac-jax==0.0.8)"
        ],
    )
    arguments = ["step", "chain-1x2", "--optimizers", "sgd", "--chunks", "1", "--chunk", "1", "--inverse-interval", "1"]
    assert cli.main([*arguments, "--rivals"]) == 0
    assert capfd.readouterr().out.count("pip install") == 3


def test_another_package_of_the_name_is_not_asdl(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asdl", module("asdl", dump=None))
    found, (note,) = lanes("chain-2x4")
    assert [lane.name for lane in found] == ["SOAP", "kfac-jax"] and "ASDL (pip install --pre asdfghjkl)" in note


def test_a_rival_that_fails_or_does_not_fit_is_left_out(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("of its own")

    monkeypatch.setattr(GradientMaker, "forward_and_backward", broken)
    found, notes = lanes("adding")
    assert [lane.name for lane in found] == ["SOAP"]
    assert notes == [
        "ASDL is left out, it failed with ZeroDivisionError: of its own",
        "kfac-jax is left out: it takes chains of nn.Linear with tanh, sigmoid or ReLU here, no Adder",
    ]


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.ReLU])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "categorical"])
def test_kfac_jax_gets_the_same_loss(likelihood: str, activation: type[nn.Module]) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5), activation(), nn.Linear(5, 4)).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    y = torch.randint(4, (7,)) if likelihood == "categorical" else torch.rand(7, 4, dtype=torch.float64).round()
    nll = {
        "bernoulli": lambda z: nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum") / 7,
        "gaussian": lambda z: 0.5 * nn.functional.mse_loss(z, y, reduction="sum") / 7,
        "categorical": lambda z: nn.functional.cross_entropy(z, y),
    }[likelihood]
    task = Task(lambda: model, lambda seed: iter(()), lambda z, y: nll(z), likelihood)
    layers, parameters = chain_of(model, JNP)
    loss = jax_loss(task, layers, JAX, KFAC_JAX)
    assert loss(parameters, (x.numpy(), y.numpy())) == pytest.approx(float(nll(model(x).detach())), rel=1e-12)


def test_kfac_jax_takes_no_other_layers() -> None:
    with pytest.raises(Unsuitable, match="no Conv2d"):
        chain_of(nn.Sequential(nn.Conv2d(1, 2, 3)), JNP)
    with pytest.raises(Unsuitable, match="no Linear"):
        chain_of(nn.Sequential(nn.Linear(2, 2, bias=False)), JNP)


def test_what_was_measured_is_written(installed: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "step.json"
    arguments = ["step", "chain-2x4", "--optimizers", "sgd,kfac", "--chunks", "1", "--chunk", "2", "--no-compile"]
    arguments += ["--inverse-interval", "2", "--rivals", "--json", str(file)]
    assert cli.main([*arguments, "--counts"]) == 0
    table = capfd.readouterr().out
    assert all(word in table for word in ("kfac-jax", "ASDL", "Python calls", "launches", "waits", "own pass"))
    assert "factors and inverses due, 1 step" in table and "step() alone" in table
    found = json.loads(file.read_text())
    assert [one["optimizer"] for one in found["times"]] == ["sgd", "kfac", "SOAP", "ASDL", "kfac-jax"]
    sgd, both, factors = found["counts"]
    assert (sgd["kind"], both["kind"], factors["kind"]) == ("every step", "factors and inverses due", "factors due")
    for one in found["counts"]:
        assert one["whole"]["operators"] == sum(stage["operators"] for stage in one["stages"].values())
        assert one["step"]["operators"] + one["stages"]["before step()"]["operators"] == one["whole"]["operators"]
    assert found["options"]["inverse_interval"] == 2 and found["environment"]["python"]
    assert cli.main([*arguments, "--chunks", "0"]) == 0, "its own file may be written over"
    table = capfd.readouterr().out
    assert "own pass" not in table and "ms a step" not in table and "launches" in table
    assert json.loads(file.read_text())["times"] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chain-0x4"], "task 'chain-0x4': 1 to 1000 layers of width 1 to 10000, as in chain-24x16"),
        (["chain-4"], "unknown task 'chain-4'"),
        (["chain-1x2", "--json", "."], "--json . cannot be written: it is a folder"),
        (["chain-1x2", "--json", "thesis.json"], "--json thesis.json is there and was not written by this command"),
        (["chain-1x2", "--chunks", "-1"], "--chunks -1: at least 0"),
    ],
)
def test_mistakes_end_with_two_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("thesis.json").write_text("{}")
    assert cli.main(["step", *arguments]) == 2
    complaint = capfd.readouterr().err
    assert said in complaint and complaint.count("\n") == 1
    assert Path("thesis.json").read_text() == "{}"
