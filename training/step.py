"""One training step's mathematics: views -> embeddings -> loss -> gradients, whole or in chunks of views."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from model.objective import Loss

Objective = Callable[..., Loss]


class Encoder(nn.Module):
    """Backbone and projector as the one module that is trained: (N, 3, S, S) -> (N, D)."""

    def __init__(self, backbone: nn.Module, projector: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))


def embed(encoder: nn.Module, x: Tensor, per_view: bool) -> Tensor:
    """(V, B, 3, S, S) -> (V, B, D). `per_view` gives every view batch-norm statistics of its own; else they are pooled."""
    if per_view:
        return torch.stack([encoder(view) for view in x])
    return encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def backward(
    encoder: nn.Module,
    groups: list[Tensor],
    objective: Objective,
    scale: Callable[[Tensor], Tensor],
    per_view: bool,
    autocast: Callable[[], contextlib.AbstractContextManager],
) -> tuple[Loss, Tensor]:
    """Loss and gradients with all views in one graph.

    groups: views by resolution, each (V_g, B, 3, S, S), the global views first, local crops (if any) second.
    Returns the loss and the embeddings of all views (V, B, D), detached.
    """
    with autocast():
        z = torch.cat([embed(encoder, x, per_view) for x in groups])
    loss = objective(z, local=local_views(groups))
    scale(loss.total).backward()
    return loss, z.detach()


def backward_chunked(
    encoder: nn.Module,
    groups: list[Tensor],
    objective: Objective,
    scale: Callable[[Tensor], Tensor],
    chunk: int,
    autocast: Callable[[], contextlib.AbstractContextManager],
) -> tuple[Loss, Tensor]:
    """The same loss and gradients with at most `chunk` views in a graph (GradCache, Gao et al. 2021).

    Three parts: embed everything without a graph; the loss and its gradient at the embeddings; embed again, chunk by
    chunk, and push that gradient through. Exact because batch-norm statistics are per view here: no statistic crosses
    a cut. The first pass leaves the running statistics alone, so they move once, as in `backward`.
    """
    cuts = [part for x in groups for part in x.split(chunk)]
    states = []
    with torch.no_grad(), frozen_statistics(encoder), autocast():
        z = []
        for part in cuts:
            states.append(random_state(part.device))
            z.append(embed(encoder, part, per_view=True))
    z = [part.detach().requires_grad_() for part in z]
    loss = objective(torch.cat(z), local=local_views(groups))
    scale(loss.total).backward()
    for i, (part, zi) in enumerate(zip(cuts, z)):
        restore_random_state(part.device, states[i])  # dropout and drop path repeat what the first pass drew
        last = i == len(cuts) - 1
        with gradient_sync(encoder, last):
            with autocast():
                out = embed(encoder, part, per_view=True)
            out.backward(zi.grad)
    return loss, torch.cat(z).detach()


def local_views(groups: list[Tensor]) -> list[bool] | None:
    """Which of all the views are local crops: those of every group but the first."""
    return [g > 0 for g, x in enumerate(groups) for _ in x] if len(groups) > 1 else None


def random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def restore_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def gradient_sync(encoder: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """DDP reduces gradients once a step: in the backward pass of the last chunk."""
    if isinstance(encoder, DistributedDataParallel) and not last:
        return encoder.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Batch statistics normalize as in training, running statistics stay as they are."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for m in norms:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in norms:
            m.track_running_stats = True


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch-norm over all ranks for devices that `nn.SyncBatchNorm` refuses (the CPU); same parameters and buffers.

    Differentiable all-reduce of count, sum and sum of squares: equal to one process on the concatenated batch.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        wide = x.double()  # sum of squares minus square of sums: fp32 would lose what the 1e-5 guarantee needs
        count = torch.full((1,), x.numel() / x.shape[1], dtype=wide.dtype, device=x.device)
        momentum = 0.1 if self.momentum is None else self.momentum
        sums = all_reduce(torch.cat([wide.sum(dims), wide.square().sum(dims), count]))
        n = sums[-1]
        mean, square = (sums[:-1] / n).chunk(2)
        variance = square - mean.square()
        if self.running_mean is not None and self.running_var is not None and self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1  # type: ignore[assignment,operator]
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_((variance * n / (n - 1)).to(self.running_var.dtype), momentum)
        y = (wide - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        y = y.to(x.dtype)
        return y * self.weight.view(shape) + self.bias.view(shape) if self.affine else y


def synchronize_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """Make every batch-norm compute its statistics over all ranks; parameter names stay. One process: unchanged."""
    if not dist.is_initialized():
        return module
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for m in module.modules():
        if type(m) in (nn.BatchNorm1d, nn.BatchNorm2d):
            m.__class__ = GlobalBatchNorm
    return module
