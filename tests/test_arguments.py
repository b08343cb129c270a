"""Bad input: the error names the argument, the value that came, and what is allowed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kfac_triton import KFAC, Categorical, Gaussian


def kfac(model=None, **options) -> KFAC:
    return KFAC(
        nn.Linear(3, 2) if model is None else model, **{"likelihood": "categorical", "compile": False, **options}
    )


@pytest.mark.parametrize(
    ("model", "came"),
    [
        (lambda: nn.Linear(3, 2).parameters(), "generator"),
        (lambda: list(nn.Linear(3, 2).parameters()), "list"),
        (lambda: torch.zeros(3), "Tensor"),
        (lambda: None, "NoneType"),
        (lambda: nn.Linear, "type"),
    ],
)
def test_the_model_must_be_a_module(model, came):
    with pytest.raises(TypeError, match=rf"model must be a torch.nn.Module.*got {came}.*KFAC\(model, \.\.\.\)"):
        KFAC(model(), likelihood="categorical")


def test_the_model_must_be_given():
    with pytest.raises(TypeError, match="model"):
        KFAC()


def test_the_likelihood_must_be_given_unless_the_fisher_is_empirical():
    with pytest.raises(ValueError, match=r'likelihood is needed unless fisher="empirical".*"categorical"'):
        KFAC(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="likelihood is needed"):
        KFAC(nn.Linear(3, 2), fisher="exact")
    KFAC(nn.Linear(3, 2), fisher="empirical", compile=False)


NUMBERS = [math.nan, math.inf, -math.inf, "0.1", None, True, [0.1]]


@pytest.mark.parametrize(
    ("argument", "values", "allowed"),
    [
        ("likelihood", ["softmax", "Categorical", 1, nn.CrossEntropyLoss()], '"categorical", "bernoulli", "gaussian"'),
        ("fisher", ["true", "MC", None, 1], "'mc', 'exact', 'empirical'"),
        ("fisher_pass", ["both", "Replay", None, True], "'auto', 'replay', 'piggyback'"),
        ("approximation", ["inverse-free", "kfac", None], "'kronecker', 'tridiagonal', 'eigen', 'inverse_free'"),
        ("weight_sharing", ["mean", None], "'expand', 'reduce'"),
        ("lr", [*NUMBERS, -1e-3, "Adaptive"], ""),
        ("momentum", [*NUMBERS, -0.1, 1.0, 1.5, "Adaptive"], ""),
        ("damping", [*NUMBERS, -1e-3, "Adaptive"], ""),
        ("weight_decay", [*NUMBERS, -1e-3], ">= 0"),
        ("loss_scale", [*NUMBERS, 0.0, -1.0], "> 0"),
        ("factor_decay", [*NUMBERS, -0.1, 1.0], "< 1"),
        ("factor_fraction", [*NUMBERS, 0, 0.0, -0.5, 2, 1.01], "> 0.*<= 1"),
        ("precision", ["fp32", "tf32", None, 16], "auto.*ieee.*bf16"),
        ("quadratic_fraction", [*NUMBERS, 0, -0.5, 1.01], "> 0.*<= 1"),
        ("factor_interval", [*NUMBERS, 0, -1, 2.0], "integer >= 1"),
        ("inverse_interval", [*NUMBERS, 0, -1, 2.0], "integer >= 1"),
        ("max_factor_dim", [*NUMBERS, 0, -1, 2.0], "integer >= 1"),
        ("kl_clip", [math.nan, -math.inf, "0.1", True, 0.0, -1.0], "> 0"),
        ("kl_annealing", [None, 1, "yes"], "True or False"),
        ("fallback_lr", [math.nan, math.inf, "0.1", True, -1.0], ">= 0"),
        ("seed", [math.nan, "0", None, True, -1, 0.5], "integer >= 0"),
        ("output", [0, "logits"], "callable"),
        ("mask", [0, torch.ones(2, dtype=torch.bool)], "callable"),
        ("check_loss_scale", [None, 1, "yes"], "True or False"),
        ("compile", [None, 2, "yes"], "one of 'auto', True, False, 'step'"),
    ],
)
def test_values_out_of_range(argument, values, allowed):
    for value in values:
        with pytest.raises(ValueError, match=rf"(?s)^{argument} must be .*{allowed}.*got ") as error:
            kfac(**{argument: value})
        # The value itself stands behind "got", but for objects with a long text.
        assert str(error.value).split("got ")[-1].strip().startswith(repr(value)[:8]), value


@pytest.mark.parametrize("argument", ["lr", "momentum", "damping"])
def test_an_adaptive_mode_needs_a_likelihood(argument):
    with pytest.raises(ValueError, match=f'^{argument}="adaptive" needs likelihood'):
        KFAC(nn.Linear(3, 2), fisher="empirical", **{argument: "adaptive"})


def test_an_adaptive_step_length_takes_no_trust_region():
    with pytest.raises(ValueError, match=r'^kl_clip must be None with lr="adaptive".*got 0.01'):
        kfac(lr="adaptive", kl_clip=0.01)
    assert kfac(lr="adaptive").param_groups[0]["kl_clip"] == math.inf
    assert kfac(lr="adaptive", kl_clip=None).param_groups[0]["kl_clip"] == math.inf
    assert kfac(momentum="adaptive").param_groups[0]["kl_clip"] == 1e-3


def test_initial_damping_belongs_to_adaptive_damping():
    with pytest.raises(ValueError, match=r'initial_damping belongs to damping="adaptive".*got 0.5'):
        kfac(initial_damping=0.5)
    for bad in (0.0, -1.0, math.nan, math.inf, "1"):
        with pytest.raises(ValueError, match=r"^initial_damping must be a number > 0"):
            kfac(damping="adaptive", initial_damping=bad)


def test_groups_hold_numbers_and_flags():
    (group,) = kfac(lr="adaptive", momentum="adaptive", damping="adaptive", weight_decay=0.25).param_groups
    assert (group["lr"], group["momentum"], group["damping"]) == (1.0, 1.0, 0.6)
    assert group["gamma"] == math.sqrt(0.6 + 0.25)
    assert group["adaptive_lr"] is group["adaptive_momentum"] is group["adaptive_damping"] is True
    (group,) = kfac(damping="adaptive", initial_damping=2.0).param_groups
    assert (group["damping"], group["adaptive_lr"], group["adaptive_momentum"]) == (2.0, False, False)


def test_lr_as_a_tensor():
    for bad in (torch.zeros(1), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="lr as a tensor must be 0-d; got shape"):
            kfac(lr=bad)
    with pytest.raises(ValueError, match="lr must be a number"):
        kfac(lr=torch.tensor(math.nan))
    kfac(lr=torch.tensor(0.1))


def test_the_edges_of_every_range_are_allowed():
    kfac(lr=0.0, momentum=0.0, damping=0.0, weight_decay=0.0, factor_decay=0.0, factor_fraction=1.0)
    kfac(lr=1, damping=1, weight_decay=1, factor_interval=1, inverse_interval=1, max_factor_dim=1, factor_fraction=1)
    kfac(kl_clip=1e-12, fallback_lr=0.0, seed=2**62, likelihood=Categorical(dim=1), loss_scale=1e-9)
    kfac(kl_clip=None, likelihood=Gaussian(), output=lambda z: z, mask=lambda x, z: z[..., 0] > 0)


def test_a_fallback_lr_has_no_ratio_to_an_lr_of_zero():
    with pytest.raises(ValueError, match=r"fallback_lr.*lr=0"):
        kfac(lr=0.0, fallback_lr=0.1)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="dampening"):
        kfac(dampening=0.1)
    with pytest.raises(TypeError, match="positional"):
        KFAC(nn.Linear(3, 2), None, 0.1)


# ------------------------------------------------------------------------------------------------------------- params


def test_params_of_another_model():
    with pytest.raises(ValueError, match=r"params holds a tensor of shape \(4, 4\) that is no parameter of model"):
        kfac(params=nn.Linear(4, 4).parameters())


@pytest.mark.parametrize(
    ("params", "error"),
    [(lambda m: [], ValueError), (lambda m: m.weight, TypeError), (lambda m: [m.weight, m.weight], ValueError),
     (lambda m: [m.weight * 2], ValueError), (lambda m: [1.0], TypeError)],
)  # fmt: skip
def test_params_as_torch_optim_refuses_them(params, error):
    model = nn.Linear(3, 2)
    with pytest.raises(error):
        kfac(model, params=params(model))


def test_a_model_without_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        kfac(nn.ReLU())
    with pytest.raises(ValueError, match="empty parameter list"):
        kfac(nn.Linear(3, 2).requires_grad_(False))


@pytest.mark.parametrize("option", [{"factor_interval": 0}, {"lr": math.nan}, {"damping": -1.0}, {"momentum": 1.0}])
def test_groups_are_checked_like_arguments(option):
    model = nn.Linear(3, 2)
    (name,) = option
    with pytest.raises(ValueError, match=f"^{name} must be"):
        kfac(model, params=[{"params": model.parameters(), **option}])


def test_lazy_parameters():
    with pytest.raises(ValueError, match=r"lazy parameter.*call the model once"):
        kfac(nn.LazyLinear(3))


def test_complex_parameters():
    with pytest.raises(ValueError, match=r"real floating-point.*complex64"):
        kfac(nn.Linear(3, 2, dtype=torch.complex64))


def test_parameters_on_two_devices():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"one device; got .*cpu.*meta"):
        kfac(model)


def test_a_refused_argument_leaves_no_hook_behind():
    model = nn.Linear(3, 2)
    for options in ({"lr": -1.0}, {"fisher": "none"}, {"params": nn.Linear(1, 1).parameters()}, {"fallback_lr": -1.0}):
        with pytest.raises(ValueError):
            kfac(model, **options)
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("dim", [None, True, 1.0, "last"])
def test_the_likelihoods_axis(dim):
    with pytest.raises(ValueError, match=r"dim must be an int.*got"):
        Categorical(dim=dim)


def test_the_empirical_fisher_has_no_pass_of_its_own():
    with pytest.raises(ValueError, match=r'fisher_pass must be "auto" with fisher="empirical"; got \'replay\''):
        KFAC(nn.Linear(2, 2), fisher="empirical", fisher_pass="replay")
