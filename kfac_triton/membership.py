"""Which parameters an optimizer trains and where they stand in its model, and what changed of that between two steps.

Users take parameters out of groups, exchange layers, load a model with assign=True and convert it to another dtype. All
of this is noticed by comparing identities, a few microseconds a step.
"""

from __future__ import annotations

from operator import is_
from typing import Any

import torch
from torch import nn


class Members:
    """The parameters `listed` in the groups and the tree of `module` as they are now.

    `names`: every parameter of the module. `present`: the listed ones that are the module's.
    """

    def __init__(self, module: nn.Module, listed: list[nn.Parameter]) -> None:
        self.names = {p: name for name, p in module.named_parameters()}
        self.listed = listed
        self.present = [p for p in listed if p in self.names]
        self._module = module
        self._forms = [(p.dtype, p.shape) for p in listed]
        self._places: list[tuple[dict[str, Any], str, Any]] = []
        for child in module.modules():
            if not isinstance(child, torch.jit.ScriptModule):  # whose parts stay what they are
                for table in (child._parameters, child._modules):
                    self._places += [(table, key, value) for key, value in table.items()]
        self._values = [value for _, _, value in self._places]

    def current(self, listed: list[nn.Parameter]) -> bool:
        """Whether nothing changed, if the groups now list these parameters."""
        return (
            len(listed) == len(self.listed)
            and all(map(is_, listed, self.listed))
            and all(map(is_, [table.get(key) for table, key, _ in self._places], self._values))
            and [(p.dtype, p.shape) for p in listed] == self._forms
            and "_is_fsdp_managed_module" not in vars(self._module)
        )

    def replaced(self) -> dict[nn.Parameter, nn.Parameter]:
        """Parameters in whose place their own layer has another one of the same shape, which no group lists.

        So does load_state_dict(assign=True). A layer that was exchanged as a whole is another layer.
        """
        now = set(self._module.parameters())
        taken = {*now.intersection(self.listed)}
        successors = {p: table.get(key) for table, key, p in self._places if p in self.names and p not in now}
        return {
            p: new
            for p, new in successors.items()
            if isinstance(new, nn.Parameter) and new in now and new not in taken and new.shape == p.shape
        }

    def reshaped(self) -> set[nn.Parameter]:
        """Listed parameters whose data has another shape now."""
        return {p for p, (_, shape) in zip(self.listed, self._forms, strict=True) if p.shape != shape}
