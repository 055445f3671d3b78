"""Being asked to stop: by SIGTERM, or by SIGUSR1 or SIGUSR2, which schedulers send before they kill."""

from __future__ import annotations

import signal
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PREEMPTED = 75  # EX_TEMPFAIL: saved, start the same command again with --resume


class Stop:
    """Whether to stop after this step: the same answer on every rank, also when one rank alone (or its node) was asked.

    A rank that left by itself would leave the others waiting for it in the next step. So each step the ranks share what
    they were asked, and act on it one step later: by then it has arrived, and nobody waits for the device.
    """

    def __init__(self, device: torch.device):
        self.device, self.asked = device, False
        self.before: tuple[Tensor, Any] | None = None
        for sign in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(sign, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def __call__(self) -> bool:
        """To be called once a step, on every rank."""
        if not dist.is_initialized():
            return self.asked
        before, self.before = self.before, self._share()
        if before is None:
            return False
        answer, arrived = before
        if arrived is not None:
            arrived.synchronize()
        return bool(answer)

    def _share(self) -> tuple[Tensor, Any]:
        """(whether any rank was asked, the event after which that can be read)."""
        any_rank = torch.full((1,), float(self.asked), device=self.device)
        dist.all_reduce(any_rank, dist.ReduceOp.MAX)
        if self.device.type != "cuda":
            return any_rank, None
        answer = any_rank.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return answer, arrived
