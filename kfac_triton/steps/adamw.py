"""AdamW for one parameter (Loshchilov & Hutter 2019, algorithm 2), with the usual constants.

A gradient far beyond the ones before it would stay in the second moment for thousands of steps, or overflow it. If its
largest entry is more than OUTLIER times the largest root of the second moment so far, and more than what doubles that
moment, the gradient is scaled down to that root; AdamW asks for its direction anyway. The first gradients have nothing
to be compared with, and only have to be squared without overflow.
"""

from __future__ import annotations

import torch
from torch import Tensor

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
OUTLIER = 10.0
LARGEST = 2.0**48  # entry of a first gradient


def adamw_(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor | float,
    weight_decay: Tensor | float | None,
    passed: Tensor,
) -> None:
    """One step; `step` counts those so far, and where `passed` (0-d, 0 or 1) is 0 nothing moves."""
    grad = grad * _share(grad, exp_avg_sq, step)
    step.add_(passed)
    exp_avg.add_((grad - exp_avg) * ((1 - BETA1) * passed))
    exp_avg_sq.add_((grad * grad - exp_avg_sq) * ((1 - BETA2) * passed))
    count = step.double().clamp(min=1)
    corrected = exp_avg / (1 - BETA1**count)
    root = (exp_avg_sq / (1 - BETA2**count)).sqrt() + EPS
    if weight_decay is not None:
        parameter.sub_(parameter * (lr * weight_decay * passed))
    parameter.sub_(corrected / root * (lr * passed))


def _share(grad: Tensor, exp_avg_sq: Tensor, step: Tensor) -> Tensor:
    """What of the gradient counts, 0-d, in (0, 1]."""
    if not grad.numel():
        return grad.new_ones(())
    largest, seen = grad.abs().max().double(), exp_avg_sq.max().double()
    gradients = (1 - BETA2 ** step.double().clamp(min=1)) / (1 - BETA2)  # in the average, nearly
    root = (seen / (1 - BETA2) / gradients).sqrt()
    usual = torch.where(root > 0, root.clamp(min=EPS), LARGEST)
    most = torch.where(root > 0, usual * gradients.sqrt().clamp(min=OUTLIER), LARGEST)
    return torch.where(largest > most, usual / largest, 1.0).to(grad.dtype)
