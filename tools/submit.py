"""Train on SLURM from Python, with submitit: python tools/submit.py --nodes 4 --processes 8 -- --data shards/imagenet

What follows `--` is train.py's. Preempted or at the time limit, a job saves, is requeued and goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # the checkout on the path instead of this folder, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from manyview.pipeline import errors
from manyview.pipeline.errors import UserError
from manyview.training import config
from manyview.training.preemption import PREEMPTED


@dataclass
class Submit:
    """Where and how long train.py runs."""

    nodes: int = 1
    """Machines."""
    processes: int = 8
    """Processes a node, one a GPU (none with train.py's --device cpu)."""
    cores: int = 8
    """CPU cores a process."""
    hours: float = 24.0
    """Time limit of one go; the job is requeued at it, up to ten times."""
    partition: str = ""
    """SLURM's partition; its default if not given."""
    cluster: str = "slurm"
    """slurm, or local: as processes of this machine, which wait for nobody."""
    logs: Path = Path("runs/submitit")
    """Where each task's output and submitit's own files go."""


class Train:
    """train.py as one task of a job. On SIGUSR2 submitit calls rank 0's `checkpoint` and requeues what it returns."""

    def __init__(self, root: str, words: list[str]):
        self.root, self.words = root, words

    def __call__(self) -> int:
        import submitit

        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        self.process = subprocess.Popen([sys.executable, "train.py", *self.words], cwd=self.root)
        signal.signal(signal.SIGTERM, lambda *_: self.process.send_signal(signal.SIGTERM))  # SLURM's, where it preempts
        try:
            self.wait()
        except BaseException:
            self.process.terminate()
            raise
        code = self.process.wait()
        if code == PREEMPTED:  # by SIGTERM, of which submitit takes no notice
            signal.raise_signal(signal.SIGUSR2)
        elif code:
            raise RuntimeError(f"train.py ended with {code}: see this task's log")
        return code

    def wait(self) -> None:
        """Until train.py has ended, without collecting it: `checkpoint` interrupts one wait with another."""
        with contextlib.suppress(ChildProcessError):  # has been collected
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)

    def checkpoint(self):
        """Ask train.py to save and end, on all ranks through this one; then the same again."""
        import submitit

        self.process.send_signal(signal.SIGTERM)
        self.wait()
        return submitit.helpers.DelayedSubmission(Train(self.root, self.words))


def main() -> int:
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    args, training = tyro.cli(Submit, args=words[:cut], description=__doc__), [*words[cut + 1 :], "--resume"]
    settings = config.parse(training)  # what is wrong is said now, not when the job starts
    try:
        import submitit
    except ImportError:
        raise UserError("tools/submit.py needs submitit: pip install 'manyview[cluster]'") from None
    try:
        executor = submitit.AutoExecutor(args.logs, cluster=args.cluster, slurm_max_num_timeout=10)
    except (RuntimeError, ValueError) as error:  # no srun here, no such cluster
        raise UserError(f"--cluster {args.cluster}: {error}") from None
    executor.update_parameters(
        name="manyview", nodes=args.nodes, tasks_per_node=args.processes, cpus_per_task=args.cores,
        gpus_per_node=0 if settings.device == "cpu" else args.processes,
        timeout_min=round(60 * args.hours), slurm_signal_delay_s=180, slurm_setup=["export OMP_NUM_THREADS=1"],
        **({"slurm_partition": args.partition} if args.partition else {}),
    )  # fmt: skip
    job = executor.submit(Train(sys.path[0], training))
    print(f"job {job.job_id}: {args.logs}/{job.job_id}_0_log.out")
    return 0


if __name__ == "__main__":
    errors.run(main)
