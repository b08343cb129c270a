"""A CPU served as a GPU is, whose numbers nothing waits for: the same steps as where the host reads them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import closure_step, data, mlp, train_step
from torch import Tensor, nn

from kfac_triton import KFAC


class Images(nn.Module):
    """Convolutions, one of them no view of its matrix; a norm; a scale without a block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 4, 3), nn.LayerNorm(4)
        self.up, self.scale, self.head = (
            nn.ConvTranspose1d(4, 4, 2, groups=2),
            nn.Parameter(torch.ones(5)),
            nn.Linear(20, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.conv(x[:, None]).mT).mT)
        return self.head((torch.tanh(self.up(h)) * torch.exp(self.scale)).flatten(1))


RUNS: dict[str, dict[str, Any]] = {
    "plain": {"momentum": 0.0},
    "momentum": {},
    "without a bound": {"kl_clip": None},
    "weight decay and annealing": {"weight_decay": 1e-2, "kl_annealing": True},
    "intervals": {"factor_interval": 2, "inverse_interval": 3},  # the huge batch is not sampled
    "eigen": {"approximation": "eigen", "inverse_interval": 3},  # a device renews bases in a step that it skips
    "inverse_free": {"approximation": "inverse_free"},
    "groups": {},
    "diagonals": {"max_factor_dim": 3},
    "exact": {"fisher": "exact"},
    "adaptive damping": {"damping": "adaptive", "initial_damping": 1.0},
    "all adaptive": {"lr": "adaptive", "momentum": "adaptive", "damping": "adaptive"},
}


def trained(name: str, make: type, caplog: pytest.LogCaptureFixture) -> tuple[list[Tensor], list[dict], list[str]]:
    """Parameters, states and what was said, after twelve steps: one with NaN inputs, one with huge ones."""
    torch.manual_seed(0)
    model, options = make().double(), RUNS[name]
    x, y = data()
    x = x.double()
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == wide], "lr": lr} for wide, lr in
              ((True, 0.1), (False, 0.03))]  # fmt: skip
    optimizer = KFAC(model, groups if name == "groups" else None, likelihood="categorical", compile=False,
                     **{"lr": 0.1, **options})  # fmt: skip
    take = closure_step if "adaptive" in options.values() else train_step
    caplog.clear()
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        for step in range(12):
            inputs = {4: torch.full_like(x, torch.nan), 8: 1e4 * x}.get(step, x)
            if step == 4 and "adaptive" in options.values():
                inputs = x
            take(optimizer, model, inputs, y, F.cross_entropy)
        optimizer.state_dict()
    states = [dict(optimizer.state[p]) for p in model.parameters()]
    return [p.detach().clone() for p in model.parameters()], states, sorted(r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("make", [mlp, Images])
@pytest.mark.parametrize("name", RUNS)
def test_steps_are_those_of_the_host(name, make, caplog, request):
    on_host = trained(name, make, caplog)
    request.getfixturevalue("as_on_a_device")
    on_device = trained(name, make, caplog)
    # dampings follow ratios of small differences, which rounding moves
    tolerance = 1e-5 if "adaptive" in RUNS[name].values() else 1e-9
    torch.testing.assert_close(on_device[0], on_host[0], rtol=tolerance, atol=tolerance * 1e-2)
    for state, other in zip(on_device[1], on_host[1], strict=True):
        torch.testing.assert_close(state, other, rtol=tolerance * 1e2, atol=tolerance)
    larger = [[said for said in one[2] if "far larger" in said] for one in (on_device, on_host)]
    assert larger[0] == larger[1]
    assert bool(larger[0]) == (name != "intervals")
    assert any("so this step is skipped" in said for said in on_device[2]) == ("adaptive" not in RUNS[name].values())
