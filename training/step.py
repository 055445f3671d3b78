"""One training step's mathematics: views -> embeddings -> loss -> gradients, whole or in chunks of views."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from manyview.model.objective import Loss
from manyview.model.projector import Projector
from manyview.pipeline.errors import UserError

Objective = Callable[..., Loss]
Scale = Callable[[Tensor], Tensor]  # of the loss, before its gradients
Autocast = Callable[[], contextlib.AbstractContextManager]


class PretrainingModel(nn.Module):
    """Backbone and projector as the one module that is trained: (N, 3, S, S) -> (N, D)."""

    def __init__(self, backbone: nn.Module, projector: Projector):
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
    encoder: nn.Module, groups: list[Tensor], objective: Objective, scale: Scale, per_view: bool, autocast: Autocast
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
    encoder: nn.Module, groups: list[Tensor], objective: Objective, scale: Scale, chunk: int, autocast: Autocast
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
        # DDP reduces gradients once a step: in the backward pass of the last chunk.
        alone = isinstance(encoder, DistributedDataParallel) and i < len(cuts) - 1
        with encoder.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
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


class GlobalBatchNormAct(GlobalBatchNorm):
    """The same for timm's batch-norm with an activation inside (MobileNets, EfficientNets, RegNets, DenseNets)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))  # type: ignore[operator]


def synchronize_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with every batch-norm computing its statistics over all ranks; parameter names stay. One process: unchanged.

    UserError for a kind of batch-norm that would silently stay a rank's own.
    """
    if not dist.is_initialized():
        return module
    if device.type == "cuda":
        return timm.layers.convert_sync_batchnorm(module)  # torch's own drops the activation that timm's norms hold
    known = {
        nn.BatchNorm1d: GlobalBatchNorm,
        nn.BatchNorm2d: GlobalBatchNorm,
        timm.layers.BatchNormAct2d: GlobalBatchNormAct,
    }
    for name, m in module.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if type(m) not in known:
                raise UserError(f"several processes: {name} is a {type(m).__name__}, whose statistics cannot be shared")
            m.__class__ = known[type(m)]
    return module


class RunningStatistics:
    """The running statistics of a network's batch-norms, which a step that is skipped must not move.

    The forward pass has moved them by the time that a loss or a gradient shows to be non-finite, and one NaN in a
    running mean stays there for ever. Takes back without waiting for the device.
    """

    def __init__(self, module: nn.Module):
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.buffers = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
        self.kept = self._now() if self.buffers else None

    def _now(self) -> Tensor:
        return torch.cat(self.buffers)

    @torch.no_grad()
    def settle(self, skipped: Tensor) -> None:
        """After a step: as they are, or where `skipped` (a bool scalar on the device) as they were after the last one."""
        if self.kept is not None:
            self.kept = torch.where(skipped, self.kept, self._now())
            torch._foreach_copy_(self.buffers, list(self.kept.split([len(b) for b in self.buffers])))


class Update:
    """From gradients to weights, and not where the loss or a gradient is infinite or NaN: such a step leaves nothing behind.

    torch's scaler does fp16's scaling and the skipping; in any other precision its scale is held at 1. Nobody waits for
    the device, but for LARS, which the scaler asks on the host. `encoder` is the plain module, neither compiled nor DDP.
    """

    def __init__(self, encoder: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype):
        self.encoder, self.optimizer, self.half = encoder, optimizer, dtype is torch.float16
        device = next(encoder.parameters()).device.type
        self.scaler = torch.amp.GradScaler(device, init_scale=2.0**16 if self.half else 1.0)
        self.scale = self.scaler.scale
        self.statistics = RunningStatistics(encoder)

    def __call__(self, loss: Tensor) -> Tensor:
        """After the backward pass of `loss`. Whether the step was skipped: a bool scalar on the device."""
        skipped = not_finite(loss, self.encoder)
        self.statistics.settle(skipped)
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.half else 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        return skipped

    def state_dict(self) -> dict[str, Any]:
        return {"half": self.half, **self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """To be called when the encoder's own state is there. A run that goes on in or out of fp16 starts a fresh scale."""
        saved = dict(state)
        if saved.pop("half", saved["scale"] != 1.0) == self.half:  # older checkpoints do not say it
            self.scaler.load_state_dict(saved)
        self.statistics = RunningStatistics(self.encoder)


def not_finite(loss: Tensor, module: nn.Module) -> Tensor:
    """Whether the loss or any gradient is infinite or NaN: a bool scalar on the device, nobody waits for it.

    By sums, in which no infinity or NaN is lost: on a CPU 40 times as fast as the largest value, and good to 1e30.
    """
    sums = torch.stack([p.grad.sum() for p in module.parameters() if p.grad is not None])
    return ~(torch.isfinite(loss.detach()) & torch.isfinite(sums).all())
