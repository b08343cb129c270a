"""Uses of weights in code that dynamo traces, where no hook of autograd's graph runs.

Dynamo runs this while it traces, and its guards are those of the user's own Python. What cannot be followed raises
`NotTraceable`, so that no graph is made: nothing has run then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# The functions whose uses of a weight a graph returns; eager matchers read them afterwards.
FOLLOWED = (F.linear, F.conv1d, F.conv2d, F.conv3d, F.layer_norm, F.group_norm, F.batch_norm)
RANDOM = (
    torch.rand, torch.randn, torch.randint, torch.randperm, torch.rand_like, torch.randn_like, torch.randint_like,
    torch.bernoulli, torch.multinomial, torch.normal, torch.poisson, Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_,
    Tensor.exponential_, Tensor.multinomial, Tensor.bernoulli, Tensor.random_, F.gumbel_softmax,
)  # fmt: skip
DROPOUTS = (
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
)  # fmt: skip
HOOKS = (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad)

Direction = Callable[[tuple[Any, ...], dict[str, Any], Any], tuple[Tensor, Tensor] | None]


class NotTraceable(RuntimeError):
    """Why a pass cannot be a graph."""


class TracedUse(NamedTuple):
    """One call of `FOLLOWED[function]`, without its graph.

    `dy`: the gradient of what it returned, of that `shape`. `second`: the examples, where they are on the second axis;
    else 0.
    """

    function: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: torch.Size
    second: int
    dy: Tensor


class Followed(NamedTuple):
    """Whose uses a graph follows: `parameters` of `root`, those that have a block. `cleared`: those whose gradients the
    optimizer clears. `attention`: packed attention as a plain function, see `attention_body`."""

    root: nn.Module
    parameters: Sequence[nn.Parameter]
    cleared: Sequence[nn.Parameter]
    attention: Callable[..., Any]


class TracedPass(TorchFunctionMode):
    """Follows one call of the root, the only one inside; `direction(args, kwargs, returned)` gives the outputs z and
    what to back-propagate from them, or None for no backward pass.

    `call`: what the root received, the autocast states, and the shape of z if there was a backward pass; `uses`: those
    of the parameters in it.
    """

    def __init__(self, followed: Followed, direction: Direction) -> None:
        super().__init__()
        self._root, self._parameters, self._cleared, self._attention = followed
        self._direction, self._clean = direction, False
        self._depth = 0
        self._second = 0
        self._noted: list[tuple[int, tuple[Any, ...], dict[str, Any], int, Tensor]] = []
        self.call: tuple[tuple[Any, ...], dict[str, Any], Any, torch.Size | None] | None = None
        self.uses: list[TracedUse] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            return args[0].backward(*args[1:], **kwargs)  # which dynamo knows by this name alone
        if func in HOOKS:
            raise NotTraceable("a hook on a tensor")
        if func in RANDOM or (func in DROPOUTS and _drops(args, kwargs)):
            raise NotTraceable("random numbers are drawn, which a graph draws otherwise")
        if func is F.scaled_dot_product_attention and (args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)):
            raise NotTraceable("random numbers are drawn, which a graph draws otherwise")
        if func is F.multi_head_attention_forward:
            return self._inside_attention(args, kwargs)
        out = func(*args, **kwargs)
        if self._depth == 0 or not torch.is_grad_enabled():
            return out
        known = False
        for t in (*args, *kwargs.values()):
            for inner in t if isinstance(t, (list, tuple)) else (t,):
                known = known or (isinstance(inner, nn.Parameter) and self._knows(inner))
        if not known:
            return out
        if func not in FOLLOWED:
            raise NotTraceable("a weight is used by a function that graphs do not follow")
        self._noted.append((FOLLOWED.index(func), args, kwargs, self._second, out))
        return out.clone()  # so that what is written into it in place leaves the place of dy alone

    def clear(self) -> None:
        """What stands for the optimizer's `zero_grad`, which dynamo does not follow."""
        for p in self._cleared:
            p.grad = None
        self._clean = True

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], autocast: Any) -> None:
        """A call of a module begins."""
        if self._depth == 0 and torch.is_grad_enabled():
            if module is not self._root or self.call is not None:
                raise NotTraceable("calls of parts of the model, or several calls")
            if not self._clean:
                raise NotTraceable("optimizer.zero_grad() does not come first")
            self.call = (args, kwargs, autocast, None)
        if self.call is not None:
            self._depth += 1

    def after(self, returned: Any) -> None:
        """That call returned."""
        if self.call is None or self._depth == 0:
            return
        self._depth -= 1
        if self._depth == 0 and torch.is_grad_enabled() and self.uses is None and self.call[3] is None:
            args, kwargs, autocast, _ = self.call
            found = self._direction(args, kwargs, returned)
            if found is not None:
                self.call = (args, kwargs, autocast, found[0].shape)
                self._sample(*found)

    def _inside_attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Packed attention, so that the projections inside are seen; it puts positions before examples."""
        query = args[0] if args else kwargs["query"]
        outside, self._second = self._second, query.shape[1] if query.dim() == 3 else 0
        with self:
            found = self._attention(*args, **kwargs)
        self._second = outside
        return found

    def _knows(self, t: Tensor) -> bool:
        return any([t is p for p in self._parameters])

    def _sample(self, z: Tensor, direction: Tensor) -> None:
        outs = [noted[4] for noted in self._noted]
        used = [t for noted in self._noted for t in (*noted[1], *noted[2].values()) if isinstance(t, nn.Parameter)]
        for p in self._parameters:
            if not any([t is p for t in used]):
                raise NotTraceable("a weight has no use that graphs follow")
        dys = torch.autograd.grad(z, outs, direction, retain_graph=True)
        self.uses = [
            TracedUse(
                function,
                tuple([_without_graph(t) for t in args]),
                {name: _without_graph(t) for name, t in kwargs.items()},
                out.shape,
                second,
                dy,
            )
            for (function, args, kwargs, second, out), dy in zip(self._noted, dys, strict=True)
        ]
        self._noted = []


def _drops(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a dropout draws: neither outside of training, nor with probability 0."""
    off = any([flag is False for flag in (args[2] if len(args) > 2 else True, kwargs.get("training", True))])
    return not off and (args[1] if len(args) > 1 else kwargs.get("p", 0.5)) != 0


def _without_graph(t: Any) -> Any:
    return t.detach() if isinstance(t, Tensor) and not isinstance(t, nn.Parameter) else t
