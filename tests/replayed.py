"""K-FAC's own forward pass through a model, and the uses of weights that it recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kfac_triton.capture import Inputs, ModuleState, UnseenUses, UseRecorder, bare_pass
from kfac_triton.fisher.sampled import recorded_forward


def own_forward(model: nn.Module, x: Tensor) -> Callable[[], tuple[UseRecorder, Tensor]]:
    """K-FAC's forward pass through a model that was called once."""
    parameters, state = list(model.parameters()), ModuleState(model)
    opening = state.opening(None, (x,), {})
    model(x)
    state.closing(opening)
    inputs, unseen = Inputs(model, (x,), {}, opening=opening), UnseenUses()

    def run() -> tuple[UseRecorder, Tensor]:
        with bare_pass(state, inputs, 0) as replay:
            recorder, z = recorded_forward(replay, inputs, parameters)
            recorder.add_unseen(unseen, z)
        return recorder, z

    run()
    return run


def recorded(recorder: UseRecorder) -> list[Any]:
    return [one for _, uses in recorder.uses.recorded.items() for one in uses]
