"""Multi-view objectives: functions of the projector's output `z`, shape (V, B, D). None needs to look at a pair of views.

V views of B images, D dimensions. The theory is in "Harnessing small projectors and multiple views for efficient
vision pretraining" (arXiv 2312.10725): its idealised loss pulls every view to the mean of its image's views, under
decorrelated dimensions. From `m sum_i |z_i - zbar|^2 = sum_{i<j} |z_i - z_j|^2` the invariance of all pairs costs
O(V B D), and the decorrelation is one D x D product.

Every function computes in fp32 (fp64 where `z` is) whatever autocast is around it, and returns a `Loss` of scalars.

Distributed: when torch.distributed is initialized, sums over the batch (of size D and D x D, never B x B) are
all-reduced, so every rank returns the loss of the whole batch, and the gradient that DDP averages is the gradient of
that loss. Every rank must hold the same number of rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial, wraps
from inspect import signature
from numbers import Real
from types import UnionType
from typing import Any, Literal, NamedTuple, ParamSpec, Union, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor

from manyview.pipeline.errors import UserError, nearest, refuse

# beta = C / D. Constant pressure on each dimension, beta * (D - 1), means beta ~ 1 / D; the authors' tuned values over
# D = 64 ... 8192 on CIFAR-10 fit c = 2.9 (log-log slope -1.02), on STL-10 c = 2.0 (slope -0.93).
C = 3.0
# In the authors' sweeps beta * D <= 25 trains well, 51 a little worse, and from 102 on the embedding collapses.
COLLAPSE_EDGE = 50.0
EPS = 1e-5  # added to the variance; BatchNorm's, and so the textbook's
P = ParamSpec("P")


class Loss(NamedTuple):
    """Scalars. `total` carries the gradient and is `invariance + decorrelation`, the two as weighted, detached."""

    total: Tensor
    invariance: Tensor
    decorrelation: Tensor


# ------------------------------------------------------------------------------------------------ sums over all ranks


class _Sum(torch.autograd.Function):
    """Sum over ranks of something that each rank goes on to use with its own rows: the gradient is summed too."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Sum.forward(ctx, grad)


class _FinalSum(torch.autograd.Function):
    """Sum over ranks from which every rank computes the same loss.

    The gradient arrives equal on all ranks, so the sum of it is known without sending a D x D matrix again.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _Sum.forward(ctx, x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * dist.get_world_size()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _sum(x: Tensor) -> Tensor:
    return _Sum.apply(x) if _distributed() else x


def _final_sum(x: Tensor) -> Tensor:
    return _FinalSum.apply(x) if _distributed() else x


def _rows(z: Tensor) -> int:
    """B over all ranks."""
    return z.shape[1] * (dist.get_world_size() if _distributed() else 1)


# ------------------------------------------------------------------------------------------------------ building blocks


@contextmanager
def _full_precision(z: Tensor, local: Sequence[bool] | Tensor | None) -> Iterator[tuple[Tensor, int]]:
    """`z` in fp32 or fp64 with its global views first, how many those are, and no autocast inside."""
    if z.ndim != 3 or z.shape[1] < 2:
        raise ValueError(f"an objective takes (views, batch >= 2, dim), got {tuple(z.shape)}")
    if not z.is_floating_point():
        raise ValueError(f"an objective takes embeddings in floating point, got {z.dtype}")
    order = list(range(len(z)))
    n_global = len(z)
    if local is not None and any(local):
        if len(local) != len(z):
            raise ValueError(f"{len(z)} views, but `local` marks {len(local)}")
        order.sort(key=lambda view: bool(local[view]))
        n_global = sum(not is_local for is_local in local)
    if n_global < 2:
        raise ValueError(f"an objective needs two global views or more, got {n_global} of {len(z)} views")
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        yield (z if n_global == len(z) else z[order]), n_global


def _standardize(z: Tensor, over: str, unbiased: bool = False) -> Tensor:
    """`z` with zero mean and unit variance over the batch, per view or pooled over views; dead dimensions become 0."""
    dims, n = ((1,), _rows(z)) if over == "view" else ((0, 1), _rows(z) * len(z))
    centered = z - _sum(z.sum(dims, keepdim=True)) / n
    variance = _sum(centered.square().sum(dims, keepdim=True)) / (n - unbiased)
    # The paper divides by the unbiased deviation without eps; the floor only keeps a dead dimension from being 0 / 0.
    variance = variance.clamp_min(1e-18) if unbiased else variance + EPS
    return centered * variance.rsqrt()


def _spread(z: Tensor, n_global: int) -> Tensor:
    """Unbiased within-image variance E|z - E[z | image]|^2, summed over dimensions: a scalar, the same for every V."""
    g = n_global
    squares = _final_sum((z - z[:g].mean(0)).square().sum((1, 2))) / _rows(z)
    # A global view is part of the mean it is compared with, a local one is not: (G - 1) / G and (G + 1) / G too large.
    return (squares[:g].sum() * g / (g - 1) + squares[g:].sum() * g / (g + 1)) / len(z)


def _off_diagonal(z: Tensor, n: int) -> Tensor:
    """Sum of squares off the diagonal of `z^T z / n`, z (..., B, D), added up over leading dimensions.

    |z^T z| = |z z^T|, so the smaller of the two products does. Over ranks only the D x D one is a sum.
    """
    if z.shape[-1] <= z.shape[-2] or _distributed():
        return _off_diagonal_of(_final_sum(z.mT @ z) / n)
    return (z @ z.mT / n).square().sum() - (z.square().sum(-2) / n).square().sum()


def _off_diagonal_of(c: Tensor) -> Tensor:
    return c.square().sum() - c.diagonal(dim1=-2, dim2=-1).square().sum()


def _strength(beta: float | str, auto: float) -> float:
    return auto if beta == "auto" else float(beta)


def _collapses(beta: float, dim: int) -> str:
    """What to tell about a `beta` on correlations that is past the known edge; empty where it is not."""
    if beta * dim <= COLLAPSE_EDGE:
        return ""
    return (
        f"beta * D = {beta * dim:.0f} is past {COLLAPSE_EDGE:.0f}, where embeddings are known to collapse; "
        f"beta = {C / dim:.3g} is the default for D = {dim}"
    )


def _correlation_strength(beta: float | str, dim: int) -> float:
    value = _strength(beta, C / dim)
    if text := _collapses(value, dim):
        warnings.warn(text, stacklevel=4)  # where the objective is called
    return value


def _loss(invariance: Tensor, decorrelation: Tensor) -> Loss:
    return Loss(invariance + decorrelation, invariance.detach(), decorrelation.detach())


# ------------------------------------------------------------------------------------------------------ the objectives


def _checked(function: Callable[P, Loss]) -> Callable[P, Loss]:
    """The same, with ValueError for options that its types do not allow: a wrong word would quietly be another formula."""

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> Loss:
        named = [(key, value) for key, value in options.items() if key not in ("z", "local")]
        if errors := [text for key, value in named if (text := _invalid(call, key, value))]:
            raise ValueError("; ".join(errors))
        return function(*args, **options)

    return call


@_checked
def barlow(
    z: Tensor,
    *,
    beta: float | Literal["auto"] = "auto",
    form: Literal["mean", "cross", "pairs"] = "mean",
    standardize: Literal["view", "pooled"] = "view",
    local: Sequence[bool] | Tensor | None = None,
) -> Loss:
    """Multi-view Barlow Twins (arXiv 2103.03230): sum_k (C_kk - 1)^2 + beta sum_{k != l} C_kl^2, with z (V, B, D) standardized.

    The diagonal is each view's correlation with the mean of the others: Barlow Twins' own at V = 2, an unbiased
    estimate of the correlation between two views at every V. The off-diagonal C comes in three forms:

    - `mean`: of the views' mean, C(zbar, zbar): one product of B rows. It is (1/V) S + (1 - 1/V) X, where S is the
      correlation within a view and X that across views: at V = 2 it also holds half of the within-view correlation.
    - `cross`: X alone, (V^2 C(zbar, zbar) - sum_i C(z_i, z_i)) / (V (V - 1)): linear in V. At V = 2 it is Barlow
      Twins with the correlation symmetrised.
    - `pairs`: the mean of the loss over pairs of views, quadratic in V in time and, at V^2 D^2, in memory. Barlow
      Twins itself at V = 2; for reference.

    `mean` is the default by its cost (results/objective.md); in accuracy it is behind no other form at V = 2, 4 and 8
    (results/paper.md).
    `standardize` per view is the textbook's, and lets no shift between views hide; pooled is the paper's.
    `local` marks views (multi-crop) that are pulled to the mean of the global ones and enter nothing else.
    """
    with _full_precision(z, local) as (x, g):
        strength = _correlation_strength(beta, x.shape[-1])
        y = _standardize(x, standardize)
        if form == "pairs":
            on, off = _pairs(y, g)
            return _loss(on, strength * off)
        mean = y[:g].mean(0)
        others = torch.cat([(g * mean - y[:g]) / (g - 1), mean.expand_as(y[g:])])  # means of the *other* global views
        on = (1 - _final_sum((y * others).sum(1)) / _rows(y)).square().sum(-1).mean()
        off = _off_diagonal(mean, _rows(y)) if form == "mean" else _off_diagonal_of(_cross(y[:g], mean))
        return _loss(on, strength * off)


def _cross(z: Tensor, mean: Tensor) -> Tensor:
    """The mean over ordered pairs of different views of C(z_i, z_j), (D, D), in two products."""
    v, rows = len(z), z.flatten(0, 1)
    scale = 1 / (v * (v - 1) * _rows(z))
    within = rows.mT @ rows
    return _final_sum(torch.addmm(within, mean.mT, mean, beta=-scale, alpha=v * v * scale))


def _pairs(z: Tensor, g: int) -> tuple[Tensor, Tensor]:
    """Barlow Twins' two terms, each the mean over pairs: (any view, another global one) and (global, global)."""
    n = _rows(z)
    on = (1 - _final_sum(torch.einsum("ibd,jbd->ijd", z, z[:g])) / n).square().sum(-1)
    on = (on.sum() - on.diagonal().sum()) / (len(z) * g - g)
    i, j = torch.triu_indices(g, g, offset=1, device=z.device)
    return on, _off_diagonal_of(_final_sum(z[i].mT @ z[j]) / n) / len(i)


@_checked
def vicreg(
    z: Tensor,
    *,
    beta: float | Literal["auto"] = "auto",
    form: Literal["view", "pooled"] = "view",
    local: Sequence[bool] | Tensor | None = None,
) -> Loss:
    """Multi-view VICReg (arXiv 2105.04906) on z (V, B, D): 25 invariance + 25 variance + beta covariance; "auto" is beta = 1.

    Invariance is the mean squared distance over pairs of views, by the mean. Variance and covariance are each view's
    (`view`: at V = 2 this is VICReg) or those of all V B rows (`pooled`: one D x D product of the same scale).
    `decorrelation` holds variance and covariance. Views marked `local` enter the invariance only.
    """
    with _full_precision(z, local) as (x, g):
        dim = x.shape[-1]
        invariance = 2 * _spread(x, g) / dim
        rows = x[:g] if form == "view" else x[:g].flatten(0, 1)[None]
        n = _rows(rows)
        centered = rows - _sum(rows.sum(1, keepdim=True)) / n
        deviation = (_final_sum(centered.square().sum(1)) / (n - 1) + 1e-4).sqrt()
        covariance = 2 * _off_diagonal(centered, n - 1) / (len(rows) * dim)
        return _loss(25 * invariance, 25 * (1 - deviation).relu().mean() + _strength(beta, 1.0) * covariance)


@_checked
def spectral(
    z: Tensor, *, beta: float | Literal["auto"] = "auto", local: Sequence[bool] | Tensor | None = None
) -> Loss:
    """The idealised loss: E|f - T f|^2, T the mean over an image's views, + beta |Cov f - I|^2 on z (V, B, D).

    The first term is unbiased at every V, sum_i |z_i - zbar|^2 / (V - 1). Its minimum spans the top D eigenfunctions
    of the augmentation kernel (the constant one left out), each shrunk to variance 1 - (1 - lambda) / (2 beta): so
    "auto" is 1, not C / D, because eigenfunctions with lambda < 1 - 2 beta would be dropped.
    """
    with _full_precision(z, local) as (x, g):
        rows = x[:g].flatten(0, 1)[None]
        n = _rows(rows)
        centered = rows - _sum(rows.sum(1, keepdim=True)) / n
        variance = _final_sum(centered.square().sum(1)) / n
        distance = _off_diagonal(centered, n) + (variance - 1).square().sum()
        return _loss(_spread(x, g), _strength(beta, 1.0) * distance)


@_checked
def paper(z: Tensor, *, beta: float | Literal["auto"] = "auto", local: Sequence[bool] | Tensor | None = None) -> Loss:
    """The paper's estimator as its authors compute it for V > 2, here at every V, on z (V, B, D).

    Standardized over all V B rows (unbiased deviation, no eps); each view against the mean that it is itself a part
    of, so the diagonal's residual is about (V - 1) / V of `barlow`'s; the off-diagonal is `mean`. The authors switch
    to another formula at V = 2, and so by a factor of four between V = 2 and what this one gives there.
    """
    with _full_precision(z, local) as (x, g):
        strength = _correlation_strength(beta, x.shape[-1])
        y = _standardize(x, "pooled", unbiased=True)
        mean = y[:g].mean(0)
        on = (1 - _final_sum((y * mean).sum(1)) / _rows(y)).square().sum(-1).mean()
        return _loss(on, strength * _off_diagonal(mean, _rows(y)))


# A function added here can be trained with. Its options are checked by their types; one that shall have a flag needs a field
# of the same name in training/config.py.
OBJECTIVES: dict[str, Callable[..., Loss]] = {f.__name__: f for f in (barlow, vicreg, spectral, paper)}


def create(name: str, **options: Any) -> Callable[..., Loss]:
    """The objective `name` with its options bound: a function of `z` (V, B, D) and, by its name, `local` (V,).

    An option that is None keeps its default. UserError for an unknown objective, option or value, all at once.
    """
    if name not in OBJECTIVES:
        raise UserError(nearest("objective", name, OBJECTIVES))
    function = OBJECTIVES[name]
    options = {key: value for key, value in options.items() if value is not None}
    refuse([error for key, value in options.items() if (error := _invalid(function, key, value))])
    return partial(function, **options)


def options_of(name: str) -> list[str]:
    """The options that objective `name` takes."""
    return list(_option_types(OBJECTIVES[name]))


def describe(objective: Callable[..., Loss], dim: int) -> tuple[str, dict[str, Any]]:
    """What `create` returned, with nothing left "auto" at `dim` dimensions: a text, and the options by name.

    The text says where beta is past the known edge of collapse.
    """
    assert isinstance(objective, partial)
    options = {k: p.default for k, p in signature(objective.func).parameters.items() if k not in ("z", "local")}
    options |= objective.keywords
    on_correlations = objective.func in (barlow, paper)
    if "beta" in options:
        options["beta"] = _strength(options["beta"], C / dim if on_correlations else 1.0)
    text = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in options.items()
    )
    if on_correlations and (warning := _collapses(options["beta"], dim)):
        text += f"; warning: {warning}"
    return text, options


@cache
def _option_types(function: Callable[..., Loss]) -> dict[str, Any]:
    return {k: v for k, v in get_type_hints(function).items() if k not in ("z", "local", "return")}


def _invalid(function: Callable[..., Loss], key: str, value: Any) -> str | None:
    """What is wrong with one option, by the type that its function states, or None."""
    hints = _option_types(function)
    if key not in hints:
        return f"objective {function.__name__!r} has no option {key!r}; it has: {', '.join(hints)}"
    kinds = get_args(hints[key]) if get_origin(hints[key]) in (Union, UnionType) else (hints[key],)
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if value in words or (value is None and type(None) in kinds) or (isinstance(value, bool) and bool in kinds):
        return None
    if float not in kinds and int not in kinds:
        return nearest(f"{key} of {function.__name__}", str(value), words)
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and (float in kinds or value == int(value)) and not (key == "beta" and value < 0):
        return None
    number = "a number >= 0" if key == "beta" else "a number" if float in kinds else "a whole number"
    return f"{key} must be {' or '.join([*map(repr, words), number])}, got {value!r}"
