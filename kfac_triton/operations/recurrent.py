"""Recurrent layers as K-FAC sees them: RNN, LSTM and GRU, and their cells, unrolled over the same parameters.

torch runs them as one call, inside which no weight's use can be seen. `unrolled` computes what that call does, from
the same arguments, step by step, and notes the rows of every weight: a = x_t or h_{t-1}, g = dL/ds_t, s_t the
pre-activations (Martens, Ba & Johnson 2018). The input's products are taken for all steps at once. So that one
gradient tells of all steps, s_t is written as s_t = c_t + W h_{t-1} with c (steps, examples, d_out) one tensor.

Rows stand by time: those of step t before those of step t + 1, and row i of a step continues row i of the step before;
packed sequences become shorter, so a step may have fewer rows than the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_triton.operations.linear import LinearUse
from kfac_triton.operations.use import ATEN

Step = Callable[[Tensor, Any], Any]


@dataclass(eq=False, repr=False)
class RecurrentUse(LinearUse):
    """`steps`: how many rows each time step has. Where all have as many, they are the examples (`batch_axis` 1)."""

    operation = "recurrent"
    steps: tuple[int, ...] = ()


class Note(NamedTuple):
    """How one weight was used: its inputs by time (rows, d_in), and a tensor whose gradient is that of its outputs."""

    weight: Tensor
    bias: Tensor | None
    x: Tensor
    outputs: Tensor
    steps: tuple[int, ...]


class _Weights(NamedTuple):
    """Of one layer in one direction; `w_hr` projects the hidden state of an LSTM."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


class _Steps(NamedTuple):
    """How many rows each step has, in the order of time."""

    rows: tuple[int, ...]

    def split(self, t: Tensor) -> Sequence[Tensor]:
        if self.rows[0] != self.rows[-1]:
            return torch.split(t, list(self.rows))
        by_step: Tensor = t.unflatten(0, (len(self.rows), -1))
        return torch.unbind(by_step)


LAYERS = {
    torch.lstm: "lstm", torch.gru: "gru", torch.rnn_tanh: "tanh", torch.rnn_relu: "relu",
    ATEN.lstm.input: "lstm", ATEN.gru.input: "gru", ATEN.rnn_tanh.input: "tanh", ATEN.rnn_relu.input: "relu",
    ATEN.lstm.data: "lstm", ATEN.gru.data: "gru", ATEN.rnn_tanh.data: "tanh", ATEN.rnn_relu.data: "relu",
}  # fmt: skip
CELLS = {
    torch.lstm_cell: "lstm", torch.gru_cell: "gru", torch.rnn_tanh_cell: "tanh", torch.rnn_relu_cell: "relu",
    ATEN.lstm_cell.default: "lstm", ATEN.gru_cell.default: "gru", ATEN.rnn_tanh_cell.default: "tanh",
    ATEN.rnn_relu_cell.default: "relu",
}  # fmt: skip
KINDS = {**LAYERS, **CELLS}


def unrolled(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, list[Note]]:
    """What `function`, one of `KINDS`, returns for these arguments, and the uses of its weights."""
    notes: list[Note] = []
    if function in CELLS:
        return _cell(KINDS[function], notes, *args, **kwargs), notes
    packed = isinstance(args[1], Tensor) and not args[1].is_floating_point()
    run = _packed if packed else _padded
    return run(KINDS[function], notes, *args, **kwargs), notes


def _cell(
    kind: str, notes: list[Note], input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None
) -> Any:
    state = tuple(hx) if kind == "lstm" else (hx,)
    weights = _Weights(w_ih, w_hh, b_ih, b_hh)
    _, last = _direction(kind, notes, input, state, weights, _Steps((input.shape[0],)), reverse=False)
    return last if kind == "lstm" else last[0]


def _padded(
    kind: str, notes: list[Note], input: Tensor, hx: Any, flat: Sequence[Tensor], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> Any:  # fmt: skip
    x = input.transpose(0, 1) if batch_first else input
    steps = _Steps((x.shape[1],) * x.shape[0])
    found, last = _layers(
        kind, notes, x.reshape(-1, x.shape[-1]), hx, flat, has_biases, num_layers, dropout if train else 0.0,
        bidirectional, steps,
    )  # fmt: skip
    out = found.unflatten(0, x.shape[:2])
    return (out.transpose(0, 1) if batch_first else out, *last)


def _packed(
    kind: str, notes: list[Note], data: Tensor, batch_sizes: Tensor, hx: Any, flat: Sequence[Tensor],
    has_biases: bool, num_layers: int, dropout: float, train: bool, bidirectional: bool,
) -> Any:  # fmt: skip
    steps = _Steps(tuple(batch_sizes.tolist()))
    dropout = dropout if train else 0.0
    found, last = _layers(kind, notes, data, hx, flat, has_biases, num_layers, dropout, bidirectional, steps)
    return (found, *last)


def _layers(
    kind: str, notes: list[Note], x: Tensor, hx: Any, flat: Sequence[Tensor], has_biases: bool, num_layers: int,
    dropout: float, bidirectional: bool, steps: _Steps,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """(outputs (rows, width), the last states, each (layers * directions, N, width))."""
    directions = 2 if bidirectional else 1
    states = [s.unbind() for s in (hx if kind == "lstm" else (hx,))]
    each = len(flat) // (num_layers * directions)
    ends: list[tuple[Tensor, ...]] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            own = list(flat[place * each : (place + 1) * each])
            projection = own.pop() if each in (3, 5) else None
            b_ih, b_hh = own[2:4] if has_biases else (None, None)
            weights = _Weights(own[0], own[1], b_ih, b_hh, projection)
            start = tuple(s[place] for s in states)
            out, end = _direction(kind, notes, x, start, weights, steps, reverse=direction == 1)
            outputs.append(out)
            ends.append(end)
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        if dropout and layer + 1 < num_layers:
            x = F.dropout(x, dropout, training=True)
    return x, tuple(torch.stack(parts) for parts in zip(*ends, strict=True))


def _direction(
    kind: str, notes: list[Note], x: Tensor, state: tuple[Tensor, ...], w: _Weights, steps: _Steps, *, reverse: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction: outputs (rows, width), and every sequence's last state."""
    recurrent = _recurrent_terms(kind, x, w)
    terms = F.linear(x, w.w_ih, w.b_ih)
    notes.append(Note(w.w_ih, w.b_ih, x, terms, steps.rows))
    if recurrent is None:
        terms = terms if w.b_hh is None else terms + w.b_hh
    own = [steps.split(t) for t in (terms, recurrent) if t is not None]
    projected = None
    if w.w_hr is not None:
        projected = x.new_zeros(x.shape[0], w.w_hr.shape[0], dtype=terms.dtype).requires_grad_()
        own.append(steps.split(projected))
    step = _STEPS[kind]
    W_hh = w.w_hh.t()
    order = range(len(steps.rows) - 1, -1, -1) if reverse else range(len(steps.rows))
    whole, ended = state, []
    current = tuple(s[: steps.rows[order[0]]] for s in state)
    before: list[Tensor] = [terms] * len(order)
    raw: list[Tensor] = [terms] * len(order)
    outputs: list[Tensor] = [terms] * len(order)
    for t in order:
        n = steps.rows[t]
        held = current[0].shape[0]
        if n < held:
            ended.append(tuple(s[n:] for s in current))
            current = tuple(s[:n] for s in current)
        elif n > held:
            current = tuple(torch.cat([s, first[held:n]]) for s, first in zip(current, whole, strict=True))
        before[t] = current[0]
        current = step(W_hh, [part[t] for part in own], current)
        if w.w_hr is not None:
            raw[t] = current[0]
            current = (torch.addmm(own[-1][t], raw[t], w.w_hr.t()), *current[1:])
        outputs[t] = current[0]
    ended.append(current)
    notes.append(Note(w.w_hh, w.b_hh, torch.cat(before), terms if recurrent is None else recurrent, steps.rows))
    if w.w_hr is not None and projected is not None:
        notes.append(Note(w.w_hr, None, torch.cat(raw), projected, steps.rows))
    last = tuple(torch.cat(parts[::-1]) if len(parts) > 1 else parts[0] for parts in zip(*ended, strict=True))
    return torch.cat(outputs), last


def _recurrent_terms(kind: str, x: Tensor, w: _Weights) -> Tensor | None:
    """What a GRU adds to W h before it is gated, which for the other kinds is added to the input's terms."""
    if kind != "gru":
        return None
    if w.b_hh is None:
        return w.w_hh.new_zeros(x.shape[0], w.w_hh.shape[0]).requires_grad_()
    return w.b_hh.expand(x.shape[0], -1).clone()


def _lstm(W_hh: Tensor, own: Sequence[Tensor], state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    h, c = state
    i, f, g, o = torch.addmm(own[0], h, W_hh).chunk(4, dim=1)
    c = torch.addcmul(torch.sigmoid(f) * c, torch.sigmoid(i), torch.tanh(g))
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(W_hh: Tensor, own: Sequence[Tensor], state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (h,) = state
    of_x, of_h = own[0].chunk(3, dim=1), torch.addmm(own[1], h, W_hh).chunk(3, dim=1)
    r, z = torch.sigmoid(of_x[0] + of_h[0]), torch.sigmoid(of_x[1] + of_h[1])
    n = torch.tanh(of_x[2] + r * of_h[2])
    return (n + z * (h - n),)


def _tanh(W_hh: Tensor, own: Sequence[Tensor], state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.tanh(torch.addmm(own[0], state[0], W_hh)),)


def _relu(W_hh: Tensor, own: Sequence[Tensor], state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.relu(torch.addmm(own[0], state[0], W_hh)),)


_STEPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"lstm": _lstm, "gru": _gru, "tanh": _tanh, "relu": _relu}
