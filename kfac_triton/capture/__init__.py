"""The only package that knows hooks and function modes: what enters the root, and every use of a known weight.

`inputs`: references to what the user's forward passes received. `uses`: which functions use which weights, in K-FAC's
own pass. `taps`: x and dL/dy in the user's own passes. `passes`: the surroundings of K-FAC's own pass.
"""

from kfac_triton.capture.inputs import Autocast, Inputs, RootInputs, sweep_inert
from kfac_triton.capture.passes import (
    Streams,
    bare_pass,
    changed_outputs,
    own_pass,
    uncheckpointed,
    watched_calls,
)
from kfac_triton.capture.taps import ModuleTaps, module_use
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
    "UseRecorder",
    "Uses",
    "bare_pass",
    "changed_outputs",
    "custom_layers",
    "module_use",
    "own_pass",
    "sweep_inert",
    "uncheckpointed",
    "watched_calls",
]
