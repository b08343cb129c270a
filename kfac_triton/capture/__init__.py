"""The only package that knows hooks and function modes: what enters the root, and every use of a known weight.

`inputs`: references to what the user's forward passes received. `ledger`: which of these passes made the present
gradients. `uses`: which functions use which weights, in K-FAC's
own pass. `taps`: x and dL/dy in the user's own passes. `passes`: the surroundings of K-FAC's own pass.
"""

from kfac_triton.capture.compiled_calls import compiled_parts
from kfac_triton.capture.gradients import Destination
from kfac_triton.capture.inputs import Autocast, Inputs, sweep_inert
from kfac_triton.capture.ledger import Call, Ledger, Listener
from kfac_triton.capture.passes import Streams, bare_pass, changed_outputs, own_pass, uncheckpointed
from kfac_triton.capture.taps import ModuleTaps, module_use
from kfac_triton.capture.uses import MATCHERS, Recorded, Unrolled, UseRecorder, Uses, custom_layers

__all__ = [
    "MATCHERS",
    "Autocast",
    "Call",
    "Destination",
    "Inputs",
    "Ledger",
    "Listener",
    "ModuleTaps",
    "Recorded",
    "Streams",
    "Unrolled",
    "UseRecorder",
    "Uses",
    "bare_pass",
    "changed_outputs",
    "compiled_parts",
    "custom_layers",
    "module_use",
    "own_pass",
    "sweep_inert",
    "uncheckpointed",
]
