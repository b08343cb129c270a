"""Which parameters have no block, and why: each is named once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import nn

from kfac_triton.fisher.source import Source
from kfac_triton.layer import Layer
from kfac_triton.sample import Sample

log = logging.getLogger("kfac_triton")


class Coverage:
    """`reasons`: why trainable parameters have no block. `observed`: a pass or a loaded state told of the layers."""

    def __init__(self, source: Source) -> None:
        self.reasons: dict[nn.Parameter, str] = {}
        self.observed = False
        self._source = source
        self._named: set[nn.Parameter] = set()

    def note(self, reasons: Mapping[nn.Parameter, str], known: Sequence[Layer], samples: Sequence[Sample]) -> None:
        """Remembers the reasons of a pass for parameters outside of its samples and of the layers `known` before, those
        without a gradient too."""
        layers = [*(layer for layer in known if layer.weight not in reasons), *(own.layer for own in samples)]
        covered = {layer.weight for layer in layers} | {layer.bias for layer in layers if layer.bias is not None}
        without = [p for p in self._source.parameters if p.requires_grad and p not in covered]
        self.reasons = {p: reasons.get(p, "no use that a block covers was seen") for p in without}
        unsaid = [f"{self._source.names[p]} ({why})" for p, why in self.reasons.items() if p not in self._named]
        self._named.update(self.reasons)
        self.observed = True
        if unsaid and covered:
            log.info("without a K-FAC block, so AdamW updates them: %s", ", ".join(unsaid))
        elif unsaid:
            log.warning("no parameter has a K-FAC block, so AdamW updates all of them: %s", ", ".join(unsaid))
