"""The only package that knows hooks and function modes: what enters the root, and every use of a known weight.

`inputs`: references to what the user's forward passes received. `uses`: which functions use which weights, in K-FAC's
own pass; `paths`: the uses that no function call shows. `taps`: x and dL/dy in the user's own passes. `passes`: the
surroundings of K-FAC's own pass. `tensors`: input tensors of any layout.
"""

from kfac_triton.capture.inputs import Autocast, Inputs, RootInputs, sweep_inert
from kfac_triton.capture.passes import (
    Streams,
    bare_pass,
    called,
    changed_outputs,
    gradients_kept,
    own_pass,
    reseed,
    uncheckpointed,
)
from kfac_triton.capture.paths import UnseenUses
from kfac_triton.capture.taps import ModuleTaps, module_use
from kfac_triton.capture.tensors import dense
from kfac_triton.capture.uses import MATCHERS, Recorded, Unrolled, UseRecorder, Uses, custom_layers

__all__ = [
    "MATCHERS",
    "Autocast",
    "Inputs",
    "ModuleTaps",
    "Recorded",
    "RootInputs",
    "Streams",
    "Unrolled",
    "UnseenUses",
    "UseRecorder",
    "Uses",
    "bare_pass",
    "called",
    "changed_outputs",
    "custom_layers",
    "dense",
    "gradients_kept",
    "module_use",
    "own_pass",
    "reseed",
    "sweep_inert",
    "uncheckpointed",
]
