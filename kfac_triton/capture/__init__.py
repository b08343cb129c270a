"""The only package that knows hooks, function modes and patches of torch: what enters the root, and every use of a
known weight.

`inputs`: what the user's forward passes received. `state`: where they began. `ledger`: which of them made the present
gradients. `uses`: which functions use which weights; `recorded`: what it notes of a use; `custom`: uses by layers with
blocks of the user's own; `unrolled`: layers as the functions they are made of; `paths`: the uses that no function call
shows. `taps`: x and dL/dy in the user's own passes. `passes`, `replay`: the surroundings of K-FAC's own pass.
`patches`: what it changes in torch, per thread. `tensors`: tensors of any layout. `traced`: uses of weights in graphs.
"""

from kfac_triton.capture.calls import Call, Listener
from kfac_triton.capture.compiled_calls import compiled_parts
from kfac_triton.capture.custom import custom_layers
from kfac_triton.capture.gradients import Destination
from kfac_triton.capture.inputs import Autocast, Inputs, sweep_inert
from kfac_triton.capture.ledger import Ledger
from kfac_triton.capture.passes import bare_pass, changed_outputs, closure_pass, watched_calls
from kfac_triton.capture.patches import alone, backward_calls, traced_gradients, uncheckpointed
from kfac_triton.capture.paths import UnseenUses
from kfac_triton.capture.recorded import Recorded, Uses, gradients_at
from kfac_triton.capture.replay import Replay
from kfac_triton.capture.state import ModuleState, Opening
from kfac_triton.capture.taps import ModuleTaps, module_use
from kfac_triton.capture.tensors import dense
from kfac_triton.capture.traced import FOLLOWED, Followed, NotTraceable, TracedPass, TracedUse
from kfac_triton.capture.unrolled import Unrolled, attention_body
from kfac_triton.capture.uses import MATCHERS, UseRecorder, unseen_uses

__all__ = [
    "FOLLOWED",
    "MATCHERS",
    "Autocast",
    "Call",
    "Destination",
    "Followed",
    "Inputs",
    "Ledger",
    "Listener",
    "ModuleState",
    "ModuleTaps",
    "NotTraceable",
    "Opening",
    "Recorded",
    "Replay",
    "TracedPass",
    "TracedUse",
    "Unrolled",
    "UnseenUses",
    "UseRecorder",
    "Uses",
    "alone",
    "attention_body",
    "backward_calls",
    "bare_pass",
    "changed_outputs",
    "closure_pass",
    "compiled_parts",
    "custom_layers",
    "dense",
    "gradients_at",
    "module_use",
    "sweep_inert",
    "traced_gradients",
    "uncheckpointed",
    "unseen_uses",
    "watched_calls",
]
