"""Being asked to stop: by SIGTERM, by a terminal that is closed (SIGHUP), by what schedulers send before they kill (SIGUSR1,
SIGUSR2; SIGXCPU at a limit of CPU time), or by Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
PREEMPTED = 75  # EX_TEMPFAIL: saved, start the same command again with --resume


class Stop:
    """Whether to stop after this step: the same answer on every rank, also when one rank alone (or its node) was asked.

    A rank that left by itself would leave the others waiting for it in the next step. So each step the ranks share what
    they were asked, and act on it one step later: by then it has arrived, and nobody waits for the device.
    """

    def __init__(self, device: torch.device):
        self.device, self.asked = device, False
        self.before: tuple[Tensor, Any] | None = None
        self.handlers: dict[int, Any] = {}  # as they were

    def __enter__(self) -> Stop:
        for sign in SIGNALS:
            self._listen(sign)
        return self

    def _listen(self, sign: int) -> None:
        if signal.getsignal(sign) is not signal.SIG_IGN:  # as nohup has SIGHUP, and a shell in its background SIGINT
            self.handlers[sign] = signal.signal(sign, self._ask)

    def listen_to_ctrl_c(self) -> None:
        """From here on there is something to save, so the first Ctrl-C asks too; the second one interrupts at once."""
        self._listen(signal.SIGINT)

    def __exit__(self, *_: Any) -> None:
        for sign, handler in self.handlers.items():
            signal.signal(sign, handler)

    def _ask(self, sign: int, *_: Any) -> None:
        self.asked = True
        if sign == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with contextlib.suppress(OSError):  # not `print`, which may be what was interrupted
                os.write(2, b"\nstopping after this step; once more to stop at once\n")

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
