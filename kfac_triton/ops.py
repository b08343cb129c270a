"""The one door to the kernels: operators that only write the tensors they are given, checked here.

Every operator takes lists, one entry for each layer, so that a graph holds one node however many layers there are. The
kernels' modules are loaded by the first call (or `load`), so that this import is cheap. On the CPU, and wherever
Triton is absent, the operators run in plain torch. On a GPU each has a rule for taking Triton or torch's libraries,
all of them in `kernels/dispatch.py`; `backend`, or the environment variable KFAC_TRITON_BACKEND, "triton" or "torch",
overrules it. Triton's kernels add in float32, so float64 factors, and diagonal ones, go to torch in any case.

No check reads a tensor's values: nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FACTOR_DTYPES = (torch.float32, torch.float64)
DATA_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda")
ROUNDED = 160  # the narrowest matrices whose products are cheaper in bfloat16, see `multiplies_bf16_faster`
ALIGNMENT = 16  # elements: rows that begin at multiples of 64 bytes of float32


def load() -> None:
    """Loads the kernels, which registers the operators; a second call costs a dictionary lookup."""
    import kfac_triton.kernels.conv_syrk
    import kfac_triton.kernels.eigen_scale
    import kfac_triton.kernels.fused_update
    import kfac_triton.kernels.kron_matmul
    import kfac_triton.kernels.newton_schulz
    import kfac_triton.kernels.syrk  # noqa: F401
    from kfac_triton import tuned
    from kfac_triton.kernels import tiles

    tiles.use(tuned.tiles_for)


def fuses(device: torch.device) -> bool:
    """Whether kernels serve that device: a GPU, or, where KFAC_TRITON_BACKEND has them interpreted, the CPU.

    Not while code is traced, which could not follow the question: then rows are laid out for any operator.
    """
    if torch.compiler.is_compiling():
        return False
    load()
    from kfac_triton.kernels import dispatch

    return dispatch.takes_triton(True, device)


def iterates(device: torch.device) -> bool:
    """Whether damped inverses come from `newton_schulz_`, where there is an inverse to start from."""
    load()
    from kfac_triton.kernels import dispatch

    return dispatch.takes_triton(dispatch.newton_schulz(), device)


@dataclass(frozen=True)
class Patches:
    """The rows a of a convolution that nobody has written down: an image (N, C, H, W) and how the filter meets it.

    `window`: ten integers, kernel, stride, padding (left, right, top, bottom) and dilation, (height, width) each.
    """

    image: Tensor
    window: tuple[int, ...]
    groups: int

    def rows(self) -> Tensor:
        """(n, d), or (groups, n, d): d = taps * C / groups, the channels innermost."""
        load()
        from kfac_triton.kernels import conv_syrk

        return conv_syrk.patches(self.image, conv_syrk.window_of(self.window), self.groups)

    def count(self) -> int:
        """n, the positions of the filter in all images."""
        load()
        from kfac_triton.kernels import conv_syrk

        down, across = conv_syrk.window_of(self.window).outputs(*self.image.shape[-2:])
        return int(self.image.shape[0]) * down * across


@dataclass(frozen=True)
class OneHot:
    """Rows a that are one-hot: the place of the one in each, `index` (n,); `weight` (n,) multiplies them, 0 or 1."""

    index: Tensor
    width: int
    weight: Tensor | None = None

    def counts(self, dtype: torch.dtype) -> Tensor:
        """The diagonal of sum a a^T, all that it has (width,)."""
        ones = self.index.new_ones(self.index.shape, dtype=dtype) if self.weight is None else self.weight.to(dtype)
        found = torch.zeros(self.width, dtype=dtype, device=self.index.device)
        return found.index_add_(0, self.index, ones)


Rows = Tensor | Patches | OneHot


def takes_patches(image: Tensor, groups: int) -> bool:
    """Whether the patches of an image had better stay unwritten: `conv_syrk_` would take its kernel."""
    if not fuses(image.device):
        return False
    from kfac_triton.kernels import dispatch
    from kfac_triton.kernels._launch import precision_of

    channels = image.shape[1] // groups
    whole = channels * image.element_size() % 16 == 0
    rule = dispatch.conv_syrk(channels, whole, precision_of(image.dtype), image.dtype, image.device)
    return image.dtype != torch.float64 and dispatch.takes_triton(rule, image.device)


def padded_width(d: int) -> int:
    """The next multiple of 16."""
    return -(-d // ALIGNMENT) * ALIGNMENT


def padded(t: Tensor) -> Tensor:
    """The square matrices t (..., d, d) as a view of memory (..., D, D) with zeros around them, D the next multiple of
    16: rows that the kernels load and store 16 bytes at a time. t itself where it is such a view, or needs none.
    """
    d = t.shape[-1]
    D = padded_width(d)
    if t.stride()[-2:] == (D, 1) and (t.dim() < 3 or t.stride(0) == D * D):
        return t
    around = t.new_zeros(*t.shape[:-2], D, D)
    around[..., :d, :d] = t
    return around[..., :d, :d]


def whole(t: Tensor) -> Tensor:
    """All of the memory around a view that `padded` made: (..., D, D)."""
    D = padded_width(t.shape[-1])
    return t.as_strided((*t.shape[:-2], D, D), (*t.stride()[:-2], D, 1))


def syrk_(
    F: Sequence[Tensor],
    X: Sequence[Tensor],
    alpha: Sequence[Tensor],
    beta: Sequence[Tensor],
    *,
    bias: Sequence[bool] | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> None:
    """Updates running second moments in place: F_i <- beta_i F_i + alpha_i Xa_i^T Xa_i, exactly symmetric.

    Xa is X, or [X, 1] with a ones column last when `bias`. F must be symmetric on entry: only its lower triangle
    counts. beta = 0 never reads F, and alpha = 0 never lets X in, whatever either holds; so a decision taken on the
    device, to skip a non-finite batch for example, is a choice of alpha and beta.

    Args:
        F: (D, D) or (B, D, D) each, float32 or float64, unit column stride, D = d + 1 with `bias` and d without; no
            two at the same address.
        X: (n, d) or (B, n, d), n >= 0, or with an axis of images before n, over which is summed too; float32, float64,
            bfloat16 or float16, any strides. Sums are taken in F's dtype.
        alpha, beta: 0-d floating-point tensors on F's device.
        bias: false for all by default.
        precision: of float32 products on matrix units: "ieee", "tf32", "tf32x3" (CUDA), "bf16x6" (ROCm); by default
            what torch's own setting asks for, else the one as exact as float32. Torch's libraries do as they are set.
        backend: "triton" or "torch", whatever the rule says.

    Raises:
        ValueError: the lists differ in length, or an entry's shape, dtype, device or stride is not one of these.
    """
    flags = [False] * len(F) if bias is None else list(bias)
    _check_lengths(len(F), "F", X=X, alpha=alpha, beta=beta, bias=flags)
    _check_choices(precision)
    for i, (f, x, a, b, ones) in enumerate(zip(F, X, alpha, beta, flags, strict=True)):
        _check_syrk(_at(i), f, x, ones)
        _check_scalar(f"alpha{_at(i)}", a, f)
        _check_scalar(f"beta{_at(i)}", b, f)
    if len(F) == 0:
        return
    load()
    torch.ops.kfac_triton.syrk_(list(F), list(X), list(alpha), list(beta), flags, precision, backend)


def conv_syrk_(
    F: Sequence[Tensor],
    P: Sequence[Patches],
    alpha: Sequence[Tensor],
    beta: Sequence[Tensor],
    *,
    bias: Sequence[bool] | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> None:
    """`syrk_` of the rows of patches, (D, D) or (groups, D, D) each, that are never written where a kernel serves.

    Raises:
        ValueError: as `syrk_`.
    """
    flags = [False] * len(F) if bias is None else list(bias)
    _check_lengths(len(F), "F", P=P, alpha=alpha, beta=beta, bias=flags)
    _check_choices(precision)
    for i, (f, p, a, b, ones) in enumerate(zip(F, P, alpha, beta, flags, strict=True)):
        _check_conv_syrk(i, f, p, ones)
        _check_scalar(f"alpha{_at(i)}", a, f)
        _check_scalar(f"beta{_at(i)}", b, f)
    if len(F) == 0:
        return
    load()
    windows = [size for p in P for size in p.window]
    torch.ops.kfac_triton.conv_syrk_(
        list(F), [p.image for p in P], list(alpha), list(beta), flags, windows, precision, backend
    )


def multiplies_bf16_faster(device: torch.device, width: int) -> bool:
    """Whether products with two matrices of at least this width are cheaper in bfloat16, rounding them included.

    Only CPUs with instructions for it, and wide matrices: the two products and the rounding took 3.2 of the time of
    float32 at a width of 64, 1.1 at 128, 0.7 at 192 and 0.5 from 512 on (medians, one core; two cores are alike).
    """
    if device.type != "cpu" or width < ROUNDED:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def kron_matmul_(
    out: Sequence[Tensor],
    G_inv: Sequence[Tensor],
    V: Sequence[Tensor],
    A_inv: Sequence[Tensor],
    *,
    bf16: bool = False,
    dots: Tensor | None = None,
    splits: Sequence[int] = (),
    precision: str | None = None,
    backend: str | None = None,
) -> None:
    """Preconditions a list of layers: out_i <- G_inv_i V_i A_inv_i.

    Args:
        out: (d_out, d_in) or (B, d_out, d_in) each, float32 or float64; memory apart from V's.
        G_inv: (d_out, d_out) or (B, d_out, d_out); with one axis less, a diagonal that scales the rows. out's dtype.
        V: as out; also bfloat16 or float16.
        A_inv: (d_in, d_in) or (B, d_in, d_in); with one axis less, a diagonal that scales the columns. out's dtype.
        bf16: round the matrices of dense float32 layers to bfloat16; sums stay in float32.
        dots: (layers, 2), contiguous, float32 or float64; gets <out_i, V_i> over the columns before splits_i, and over
            the others.
        splits: one column for each layer; by default behind the last.
        precision, backend: as for `syrk_`.

    Raises:
        ValueError: the lists differ in length, or an entry's shape, dtype or device is not one of these.
    """
    _check_lengths(len(out), "out", G_inv=G_inv, V=V, A_inv=A_inv)
    if splits:
        _check_lengths(len(out), "out", splits=splits)
    _check_choices(precision)
    if len(out) == 0:
        return
    for i, (o, G, v, A) in enumerate(zip(out, G_inv, V, A_inv, strict=True)):
        _check_layer(i, o, G, v, A)
    if dots is not None:
        _check_shape("dots", dots, (len(out), 2))
        _check_dtype("dots", dots, FACTOR_DTYPES)
        _check_device("dots", dots, out[0])
    load()
    torch.ops.kfac_triton.kron_matmul_(
        list(out), list(G_inv), list(V), list(A_inv), bf16, dots, list(splits), precision, backend
    )


def eigen_scale_(
    out: Sequence[Tensor],
    Q_G: Sequence[Tensor],
    V: Sequence[Tensor],
    Q_A: Sequence[Tensor],
    S: Sequence[Tensor],
    damping: Sequence[Tensor],
    *,
    precision: str | None = None,
    backend: str | None = None,
) -> None:
    """Preconditions in eigenbases: out_i <- Q_G [(Q_G^T V_i Q_A) / (S_i + damping_i)] Q_A^T, all of i.

    Args:
        out, V: as for `kron_matmul_`.
        Q_G, Q_A: eigenvectors as columns, (d_out, d_out) and (d_in, d_in), or with the batch axis of out; out's dtype.
        S: the eigenvalues, as out in shape and dtype.
        damping: 0-d floating-point tensors on out's device, added to the eigenvalues.
        precision, backend: as for `syrk_`.

    Raises:
        ValueError: the lists differ in length, or an entry's shape, dtype or device is not one of these.
    """
    _check_lengths(len(out), "out", Q_G=Q_G, V=V, Q_A=Q_A, S=S, damping=damping)
    _check_choices(precision)
    if len(out) == 0:
        return
    for i, (o, G, v, A) in enumerate(zip(out, Q_G, V, Q_A, strict=True)):
        _check_layer(i, o, G, v, A, names=("Q_G", "Q_A"), diagonals=False)
        _check_shape(f"S{_at(i)}", S[i], tuple(o.shape))
        _check_dtype(f"S{_at(i)}", S[i], (o.dtype,))
        _check_device(f"S{_at(i)}", S[i], o)
        _check_scalar(f"damping{_at(i)}", damping[i], o)
    load()
    torch.ops.kfac_triton.eigen_scale_(
        list(out), list(Q_G), list(V), list(Q_A), list(S), list(damping), precision, backend
    )


def fused_update_(
    W: Sequence[Tensor],
    buffer: Sequence[Tensor],
    V: Sequence[Tensor],
    nu: Sequence[Tensor],
    lr: Sequence[Tensor],
    momentum: Sequence[Tensor],
    weight_decay: Sequence[Tensor],
    *,
    backend: str | None = None,
) -> None:
    """The end of a step: buffer_i <- momentum buffer_i + nu V_i,  W_i <- W_i - lr (buffer_i + weight_decay W_i).

    Args:
        W: (rows, taps, channels) each, any strides, float32, bfloat16, float16 or float64.
        buffer: as W, with its dtype; or an empty list, and W moves by nu V itself.
        V: as W in shape, float32 or float64.
        nu, lr, momentum, weight_decay: 0-d floating-point tensors on W's device; numbers would be compiled in.
        backend: "triton" or "torch", whatever the rule says.

    Raises:
        ValueError: the lists differ in length, or an entry's shape, dtype or device is not one of these.
    """
    scalars = {"nu": nu, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    _check_lengths(len(W), "W", V=V, **scalars)
    if buffer:
        _check_lengths(len(W), "W", buffer=buffer)
    for i, (w, v) in enumerate(zip(W, V, strict=True)):
        if w.ndim != 3:
            raise ValueError(f"W{_at(i)} has shape {tuple(w.shape)}; allowed: (rows, taps, channels)")
        _check_dtype(f"W{_at(i)}", w, DATA_DTYPES)
        _check_device(f"W{_at(i)}", w, w)
        _check_dtype(f"V{_at(i)}", v, FACTOR_DTYPES)
        for name, t in (("V", v), *((("buffer", buffer[i]),) if buffer else ())):
            _check_shape(f"{name}{_at(i)}", t, tuple(w.shape))
            _check_device(f"{name}{_at(i)}", t, w)
        if buffer:
            _check_dtype(f"buffer{_at(i)}", buffer[i], (w.dtype,))
        for name, values in scalars.items():
            _check_scalar(f"{name}{_at(i)}", values[i], w)
    if len(W) == 0:
        return
    load()
    torch.ops.kfac_triton.fused_update_(
        list(W), list(buffer), list(V), list(nu), list(lr), list(momentum), list(weight_decay), backend
    )


def newton_schulz_(
    X: Sequence[Tensor],
    M: Sequence[Tensor],
    residual: Tensor,
    *,
    precision: str | None = None,
    backend: str | None = None,
) -> None:
    """Inverts symmetric positive definite matrices from inverses of earlier ones: X_i <- M_i^-1, where it converges.

    Args:
        X: (d, d) or (B, d, d) each, float32 or float64, unit column stride; symmetric; an earlier inverse on entry, at
            any scale. Where the residual is not small, X_i is of no use afterwards.
        M: as X, any strides.
        residual: (matrices,), gets ||I - M_i X_i||_F, over the batch of an entry.
        precision, backend: as for `syrk_`; "tf32" counts as "tf32x3", since it stalls far from an inverse.

    Raises:
        ValueError: the lists differ in length, or an entry's shape, dtype, device or stride is not one of these.
    """
    _check_lengths(len(X), "X", M=M)
    _check_choices(precision)
    _check_shape("residual", residual, (len(X),))
    for i, (x, m) in enumerate(zip(X, M, strict=True)):
        if x.ndim not in (2, 3) or x.shape[-1] != x.shape[-2]:
            raise ValueError(f"X{_at(i)} has shape {tuple(x.shape)}; allowed: (d, d) or (B, d, d)")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"X{_at(i)} has column stride {x.stride(-1)}; allowed: 1")
        _check_dtype(f"X{_at(i)}", x, FACTOR_DTYPES)
        _check_dtype(f"M{_at(i)}", m, (x.dtype,))
        _check_shape(f"M{_at(i)}", m, tuple(x.shape))
        _check_device(f"X{_at(i)}", x, x)
        _check_device(f"M{_at(i)}", m, x)
        _check_device("residual", residual, x)
    if len(X) == 0:
        return
    load()
    torch.ops.kfac_triton.newton_schulz_(list(X), list(M), residual, precision, backend)


def _at(i: int) -> str:
    return f"[{i}]"


def _check_lengths(length: int, first: str, **lists: Sequence[Any]) -> None:
    for name, entries in lists.items():
        if len(entries) != length:
            raise ValueError(f"{name} has {len(entries)} entries; allowed: {length}, as {first} has")


def _check_choices(precision: str | None) -> None:
    if precision is not None:
        load()
        from kfac_triton.kernels._launch import precision_of

        precision_of(torch.float32, precision)


def _check_syrk(at: str, F: Tensor, X: Tensor, bias: bool) -> None:
    if X.ndim not in (2, 3, 4) or X.shape[-1] == 0:
        raise ValueError(f"X{at} has shape {tuple(X.shape)}; allowed: (n, d) or (B, n, d) with d >= 1, or with images")
    D = X.shape[-1] + int(bias)
    expected = (*X.shape[: F.ndim - 2], D, D)
    if tuple(F.shape) != expected or X.ndim not in (F.ndim, F.ndim + 1):
        allowed = (*X.shape[:-2], D, D)
        raise ValueError(f"F{at} has shape {tuple(F.shape)}; allowed: {allowed}, from X {tuple(X.shape)}, bias={bias}")
    _check_average(at, F)
    _check_dtype(f"X{at}", X, DATA_DTYPES)
    _check_device(f"X{at}", X, F)


def _check_conv_syrk(i: int, F: Tensor, P: Patches, bias: bool) -> None:
    image, window = P.image, P.window
    if image.ndim != 4 or len(window) != 10 or image.shape[1] % P.groups:
        raise ValueError(
            f"P[{i}] has an image of shape {tuple(image.shape)}, {P.groups} groups and a window of {len(window)} "
            "numbers; allowed: (N, C, H, W), a divisor of C, and ten"
        )
    D = window[0] * window[1] * image.shape[1] // P.groups + int(bias)
    _check_shape(f"F[{i}]", F, (P.groups, D, D) if P.groups > 1 else (D, D))
    _check_average(f"[{i}]", F)
    _check_dtype(f"the image of P[{i}]", image, DATA_DTYPES)
    _check_device(f"the image of P[{i}]", image, F)


def _check_average(at: str, F: Tensor) -> None:
    if F.shape[-1] > 1 and F.stride(-1) != 1:
        raise ValueError(f"F{at} has column stride {F.stride(-1)}; allowed: 1")
    _check_dtype(f"F{at}", F, FACTOR_DTYPES)
    _check_device(f"F{at}", F, F)


def _check_scalar(name: str, value: Tensor, like: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {value!r}; allowed: a 0-d tensor on {like.device}")
    if value.ndim != 0 or not value.is_floating_point():
        raise ValueError(f"{name} is {value.dtype} of shape {tuple(value.shape)}; allowed: a 0-d floating-point tensor")
    _check_device(name, value, like)


def _check_layer(
    i: int, out: Tensor, G: Tensor, V: Tensor, A: Tensor, names: tuple[str, str] = ("G_inv", "A_inv"),
    diagonals: bool = True,
) -> None:  # fmt: skip
    if out.ndim not in (2, 3):
        raise ValueError(f"out[{i}] has shape {tuple(out.shape)}; allowed: (d_out, d_in) or (B, d_out, d_in)")
    *batch, d_out, d_in = out.shape
    _check_shape(f"V[{i}]", V, (*batch, d_out, d_in))
    for name, factor, d in ((names[0], G, d_out), (names[1], A, d_in)):
        _check_shape(f"{name}[{i}]", factor, (*batch, d, d), *([(*batch, d)] if diagonals else []))
    _check_dtype(f"out[{i}]", out, FACTOR_DTYPES)
    _check_dtype(f"{names[0]}[{i}]", G, (out.dtype,))
    _check_dtype(f"{names[1]}[{i}]", A, (out.dtype,))
    _check_dtype(f"V[{i}]", V, DATA_DTYPES)
    for name, tensor in (("out", out), (names[0], G), ("V", V), (names[1], A)):
        _check_device(f"{name}[{i}]", tensor, out)
    if out is V:
        raise ValueError(f"out[{i}] is V[{i}]; allowed: memory of its own")


def _check_shape(name: str, tensor: Tensor, *allowed: tuple[int, ...]) -> None:
    if tuple(tensor.shape) not in allowed:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: {' or '.join(map(str, allowed))}")


def _check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: {', '.join(map(str, allowed))}")


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device.type not in DEVICES:
        raise ValueError(f"{name} is on {tensor.device}; allowed: {', '.join(DEVICES)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}; allowed: {like.device}, as the written tensor")
