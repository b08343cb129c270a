"""The tangents of torch's functions for k directions at once, by rules.

`rule`: what a rule is. `affine`, `elementwise`, `norms`, `shapes`: rules. `others`: dropout and pooling; functions that
torch differentiates one by one; functions composed of others, and those without a derivative.
"""

from __future__ import annotations

from typing import Any

from kfac_triton.tangents import affine, elementwise, norms, others, shapes
from kfac_triton.tangents.others import COMPOSED, CONSTANTS
from kfac_triton.tangents.rule import KEY, Rule

RULES: dict[Any, Rule] = {**others.RULES, **shapes.RULES, **norms.RULES, **elementwise.RULES, **affine.RULES}

__all__ = ["COMPOSED", "CONSTANTS", "KEY", "RULES", "Rule"]
