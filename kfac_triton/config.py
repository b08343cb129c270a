"""Checks of what users pass to KFAC: every error names the argument, the value that came and the values allowed."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from kfac_triton.likelihoods import Likelihood, as_likelihood

# What each argument takes.
FISHERS = ("mc", "exact", "empirical")
FISHER_PASSES = ("auto", "replay", "piggyback")
APPROXIMATIONS = ("kronecker", "tridiagonal", "eigen", "inverse_free")
WEIGHT_SHARINGS = ("expand", "reduce")
RULES = ("kl", "cap")
PRECISIONS = ("auto", "ieee", "bf16")
TEMPORALS = ("independent", "chain_symmetric", "chain")
SPATIALS = ("correlated", "uncorrelated")
NORMS = ("full", "diagonal")
COMPILE = ("auto", True, False, "step")


@dataclass(frozen=True)
class Settings:
    """The arguments of KFAC that are no hyper-parameters of a group."""

    likelihood: Likelihood | None
    loss_scale: float
    output: Callable[[Any], Tensor] | None
    mask: Callable[[Any, Tensor], Tensor] | None
    fisher: str
    fisher_pass: str
    approximation: str
    rule: str
    weight_sharing: str | Mapping[str, str]
    temporal: str
    spatial: str
    norm: str
    blocks: Mapping[type[nn.Module], Any]
    factor_fraction: float
    quadratic_fraction: float
    max_factor_dim: int
    precision: str
    seed: int
    check_loss_scale: bool
    compile: bool | str

    def __post_init__(self) -> None:
        _one_of("fisher", self.fisher, FISHERS)
        _one_of("fisher_pass", self.fisher_pass, FISHER_PASSES)
        if self.fisher == "empirical" and self.fisher_pass != "auto":
            raise ValueError(f'fisher_pass must be "auto" with fisher="empirical"; got {self.fisher_pass!r}')
        _one_of("approximation", self.approximation, APPROXIMATIONS)
        _one_of("rule", self.rule, RULES)
        for shared in self._sharings():
            _one_of("weight_sharing", shared, WEIGHT_SHARINGS)
        _one_of("temporal", self.temporal, TEMPORALS)
        _one_of("spatial", self.spatial, SPATIALS)
        _one_of("norm", self.norm, NORMS)
        _one_of("precision", self.precision, PRECISIONS)
        if self.likelihood is None and self.fisher != "empirical":
            raise ValueError(
                'likelihood is needed unless fisher="empirical": pass "categorical", "bernoulli", "gaussian" '
                "or a kfac_triton.Likelihood"
            )
        if self.approximation == "tridiagonal" and (self.fisher == "empirical" or "reduce" in self._sharings()):
            given = f'fisher="{self.fisher}"' if self.fisher == "empirical" else 'weight_sharing="reduce"'
            raise ValueError(f'approximation must be "kronecker" with {given}; got "tridiagonal"')
        if self.approximation == "eigen" and self.precision == "bf16":
            raise ValueError('precision must be "auto" or "ieee" with approximation="eigen"; got "bf16"')
        if self.temporal != "independent" and (self.approximation != "kronecker" or self.fisher == "empirical"):
            given = f'approximation="{self.approximation}"'
            given = 'fisher="empirical"' if self.fisher == "empirical" else given
            raise ValueError(f'temporal must be "independent" with {given}; got {self.temporal!r}')
        if self.spatial != "correlated" and (self.approximation == "inverse_free" or self.fisher == "empirical"):
            given = f'approximation="{self.approximation}"'
            given = 'fisher="empirical"' if self.fisher == "empirical" else given
            raise ValueError(f'spatial must be "correlated" with {given}; got {self.spatial!r}')
        for name, chosen, usual in (("temporal", self.temporal, TEMPORALS[0]), ("spatial", self.spatial, SPATIALS[0])):
            if chosen != usual and "reduce" in self._sharings():
                raise ValueError(f'{name} must be "{usual}" with weight_sharing="reduce"; got {chosen!r}')
        self._check_blocks()
        number("loss_scale", self.loss_scale, above=0.0)
        number("factor_fraction", self.factor_fraction, above=0.0, most=1.0)
        number("quadratic_fraction", self.quadratic_fraction, above=0.0, most=1.0)
        integer("max_factor_dim", self.max_factor_dim)
        integer("seed", self.seed, least=0)
        for name, value in (("output", self.output), ("mask", self.mask)):
            if value is not None and not callable(value):
                raise ValueError(f"{name} must be a callable or None; got {value!r}")
        if self.compile not in COMPILE or not isinstance(self.compile, (bool, str)):
            raise ValueError(f"compile must be one of {', '.join(map(repr, COMPILE))}; got {self.compile!r}")
        if not isinstance(self.check_loss_scale, bool):
            raise ValueError(f"check_loss_scale must be True or False; got {self.check_loss_scale!r}")

    def _sharings(self) -> tuple[str, ...]:
        """Every value that weight_sharing has."""
        shared = self.weight_sharing
        return tuple(shared.values()) if isinstance(shared, Mapping) else (shared,)

    def _check_blocks(self) -> None:
        if not isinstance(self.blocks, Mapping):
            raise ValueError(f"blocks must be a dictionary from types of modules to LayerBlocks; got {self.blocks!r}")
        for kind, block in self.blocks.items():
            if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
                raise ValueError(f"blocks must have types of modules for keys; got {kind!r}")
            if isinstance(block, type) or not (hasattr(block, "a") and hasattr(block, "g")):
                raise ValueError(f"blocks[{kind.__name__}] must be a LayerBlock; got {block!r}")
        if self.blocks and self.fisher == "empirical":
            raise ValueError('blocks must be empty with fisher="empirical", which taps layers of its own kinds alone')


def check_sharing(weight_sharing: str | Mapping[str, str], names: Iterable[str]) -> None:
    """Raises ValueError where a pattern of weight_sharing fits no parameter of these names."""
    if isinstance(weight_sharing, Mapping):
        known = [name.removesuffix(".weight") for name in names]
        for pattern in weight_sharing:
            if not fnmatch.filter(known, pattern):
                raise ValueError(
                    f"weight_sharing has {pattern!r}, which fits no layer; they are {', '.join(known[:8])}"
                    f"{', ...' if len(known) > 8 else ''}"
                )


def settings(likelihood: str | Likelihood | None, **values: Any) -> Settings:
    """The settings, with a likelihood given by name looked up."""
    return Settings(None if likelihood is None else as_likelihood(likelihood), **values)


def checked_model(model: object) -> nn.Module:
    """The model itself.

    Raises:
        TypeError: it is no module, for instance `model.parameters()`.
        NotImplementedError: its parameters are sharded.
    """
    if isinstance(model, nn.Module):
        check_whole(model)
        return model
    raise TypeError(
        f"model must be a torch.nn.Module, since K-FAC sees the layers' inputs; got {type(model).__name__}. "
        "Write KFAC(model, ...), not KFAC(model.parameters(), ...); a subset of parameters goes to params="
    )


def check_whole(model: nn.Module) -> None:
    """Raises NotImplementedError where a part of the model is sharded: a process then sees slices of its weights.

    FullyShardedDataParallel marks every module that it manages.
    """
    for name, module in model.named_modules():
        kinds = {cls.__name__ for cls in type(module).__mro__}
        if kinds & {"FullyShardedDataParallel", "FSDPModule"} or hasattr(module, "_is_fsdp_managed_module"):
            raise NotImplementedError(
                f"parameters sharded by FullyShardedDataParallel or fully_shard ({name or 'the whole model'}) are not "
                "supported; use DistributedDataParallel"
            )


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside what torch.compile and (Distributed)DataParallel made of it."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


DEFAULT_KL_CLIP = 1e-3
CAPPED_KL_CLIP = 1e-2  # of a step that a cap bounds too
# What a group counts from the first step on: steps, loss terms of an example, the largest lr where kl_annealing is on,
# whether statistics come from the user's own passes, what the last adaptive step promised; of the calibration of an
# adaptive damping the fewest and most blocks that it saw, and its failures in a row.
COUNTERS = {
    "step": 0, "terms_per_example": 1, "peak_lr": 0.0, "piggyback": False, "promise": 0.0,
    "calibrated_least": 0, "calibrated_most": 0, "calibration_failures": 0,
}  # fmt: skip
DEFAULT_FALLBACK_LR = 1e-3  # of AdamW, where lr is a multiplier of the adaptive step length
CALIBRATED_FROM = 0.6  # where the search for a first damping begins; the paper's start is 150


def adaptive_groups(
    lr: Any,
    momentum: Any,
    damping: Any,
    initial_damping: float | None,
    kl_clip: Any,
    likelihood: Any,
    approximation: str = "kronecker",
    rule: str = "kl",
) -> dict[str, Any]:
    """The hyper-parameters that may be "adaptive": flags, and the numbers that stand beside them.

    An adaptive lr or momentum has a multiplier of 1; an adaptive damping starts from `initial_damping`, or from what
    the first step finds on its way down from the paper's.
    """
    group: dict[str, Any] = {}
    for name, value, start in (
        ("lr", lr, 1.0), ("momentum", momentum, 1.0), ("damping", damping, initial_damping or CALIBRATED_FROM)
    ):  # fmt: skip
        if isinstance(value, str) and value != "adaptive":
            raise ValueError(f'{name} must be a number or "adaptive"; got {value!r}')
        group[f"adaptive_{name}"] = value == "adaptive" if isinstance(value, str) else False
        group[name] = start if group[f"adaptive_{name}"] else value
    adaptive = [name for name in ("lr", "momentum", "damping") if group[f"adaptive_{name}"]]
    if approximation == "inverse_free" and group["adaptive_damping"]:
        raise ValueError(
            'damping must be a number or a Schedule with approximation="inverse_free", whose roots follow another '
            'damping only slowly; got "adaptive"'
        )
    if adaptive and likelihood is None:
        raise ValueError(f'{adaptive[0]}="adaptive" needs likelihood, whose Fisher is in the quadratic model')
    if initial_damping is not None:
        if not group["adaptive_damping"]:
            raise ValueError(f'initial_damping belongs to damping="adaptive"; got {initial_damping!r}, {damping!r}')
        number("initial_damping", initial_damping, above=0.0)
    if kl_clip == "default":
        kl_clip = None if group["adaptive_lr"] else DEFAULT_KL_CLIP
        kl_clip = CAPPED_KL_CLIP if rule == "cap" else kl_clip
    if kl_clip is not None and group["adaptive_lr"]:
        raise ValueError(f'kl_clip must be None with lr="adaptive", which finds its own length; got {kl_clip!r}')
    group["kl_clip"] = math.inf if kl_clip is None else kl_clip
    group["rho"] = group["predicted"] = None  # of a step whose judgement is still to come
    group["calibrate_damping"] = group["adaptive_damping"] and initial_damping is None
    return group


def adapts(group: Mapping[str, Any]) -> bool:
    """Whether lr, momentum or damping is adaptive, by the numbers of the first group."""
    return bool(group["adaptive_lr"] or group["adaptive_momentum"] or group["adaptive_damping"])


def fallback_ratio(fallback_lr: float | None, lr: float | Tensor) -> float:
    """The fallback's learning rate as a multiple of lr, so that it follows lr's scheduler; a tenth by default."""
    if fallback_lr is None:
        return 0.1
    number("fallback_lr", fallback_lr, least=0.0)
    if float(lr) == 0.0:
        raise ValueError("fallback_lr is held as a multiple of lr and has none for lr=0; give lr its peak value")
    return fallback_lr / float(lr)


def check_parameters(parameters: list[nn.Parameter], model: nn.Module) -> None:
    """Raises where K-FAC cannot train these parameters with this model."""
    known = {id(p) for p in model.parameters()}
    if len(set(parameters)) < len(parameters):
        raise ValueError("params holds a parameter more than once; each must stand in one group, once")
    for p in parameters:
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError("the model has a lazy parameter without a shape; call the model once before KFAC(model)")
        if id(p) not in known:
            raise ValueError(f"params holds a tensor of shape {tuple(p.shape)} that is no parameter of model")
        if not p.is_floating_point():
            raise ValueError(f"parameters must be real floating-point tensors; one is {p.dtype}")
        if "DTensor" in (type(p).__name__, type(p.data).__name__):
            raise NotImplementedError("sharded parameters (DTensor) are not supported; use DistributedDataParallel")
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        raise ValueError(f"all parameters must be on one device; got {sorted(map(str, devices))}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def integer(name: str, value: object, least: int = 1) -> None:
    """Raises ValueError, which names the argument, unless the value is an integer >= `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}; got {value!r}")


def number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
    infinite: bool = False,
) -> None:
    """Raises ValueError, which names the argument, unless the value is a number within these limits."""
    value_of = float(value) if isinstance(value, (int, float, Tensor)) else math.nan
    fits = least <= value_of <= most and above < value_of and (value_of < below or below == math.inf)
    if fits and not isinstance(value, bool) and (math.isfinite(value_of) or infinite):
        return
    limits = [f">= {least}", f"> {above}", f"< {below}", f"<= {most}"]
    bounds = [text for text, limit in zip(limits, (least, above, below, most), strict=True) if math.isfinite(limit)]
    raise ValueError(f"{name} must be a number {' and '.join(bounds)}; got {value!r}")
