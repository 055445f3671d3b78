"""Conversion on a real Ray of this machine: two workers, one of them killed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from conftest import command
from pictures import encoded

from manyview.pipeline.convert import cluster
from manyview.pipeline.convert.verify import verify
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import Options

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray():
    """A cluster of one node with two CPUs, started as on the head of a real one; fixed ports start faster."""
    import ray

    ports = ["port", "dashboard-agent-grpc-port", "runtime-env-agent-port", "dashboard-agent-listen-port"]
    line = [
        Path(sys.executable).with_name("ray"),
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        "--disable-usage-stats",
    ]
    line += ["--include-dashboard=false", "--object-store-memory=100000000"]
    line += [f"--{name}={number}" for name, number in zip(ports, free_ports(len(ports)))]
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    head = subprocess.Popen([*map(str, line)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    try:
        assert head.stdout
        address = next(row for row in head.stdout if "--address=" in row).split("'")[1]
        ray.init(address=address, log_to_driver=False)
        yield ray
        ray.shutdown()
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), head]:
            process.kill()
        head.wait()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Eight shards of a megabyte, with an image that cannot be decoded."""
    root = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0).integers(0, 256, (48, 260, 300, 3), np.uint8)
    for i, image in enumerate(noise):
        folder = root / ("val" if i % 6 == 0 else "train") / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(encoded(image, quality=97))
    (root / "train" / "class0" / "broken.jpg").write_bytes(b"no image")
    return root


def write(source: Path, out: Path, jobs: int, executor: str) -> dict[str, str]:
    """A digest of every file that came out, but for the stamp, which holds times."""
    options = Options("folder", shard_mb=1)
    write_shards(options, source, out, jobs=jobs, max_rejected=0.05, quiet=True, executor=executor)
    assert verify(out) == []
    files = [path for path in out.rglob("*") if path.is_file() and path.name != ".stamp.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill_one(out: Path, victims: list[str]) -> None:
    """SIGKILL to the first worker that is seen in the middle of a shard."""
    end = time.time() + 60
    while time.time() < end:
        for half in out.glob(".*.tar.*.tmp"):
            worker = int(half.name.split(".")[-2])
            os.kill(worker, signal.SIGSTOP)
            if half.exists():  # stopped before it was done
                os.kill(worker, signal.SIGKILL)
                victims.append(half.name)
                return
            os.kill(worker, signal.SIGCONT)
        time.sleep(0.001)


def test_the_same_bytes_from_ray_for_any_number_of_workers_and_after_a_kill(ray, photos, tmp_path):
    expected = write(photos, tmp_path / "local" / "x", 2, "local")
    assert len([name for name in expected if name.endswith(".tar")]) >= 5
    assert write(photos, tmp_path / "one" / "x", 1, "ray") == expected
    out, victims = tmp_path / "two" / "x", []  # type: ignore[var-annotated]
    hunter = threading.Thread(target=kill_one, args=(out, victims))
    hunter.start()
    got = write(photos, out, 2, "ray")
    hunter.join()
    assert victims and got == expected  # also: what the killed worker left is gone


def misbehave(how: str):
    """Work that goes wrong; defined inside, so that it is sent to the worker as it is."""

    def work(row: SimpleNamespace) -> dict:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "raises":
            raise ZeroDivisionError("the cause")
        if how == "full":
            raise OSError(28, "No space left on device", "a.tar")
        return {}

    return work


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ("dies", UserError, "a.tar, tried 4 times: The worker died"),
        ("raises", ZeroDivisionError, "the cause"),
        ("full", UserError, "a.tar: No space left on device"),
    ],
)
def test_what_cannot_be_done_ends_with_its_cause(ray, how, error, text):
    with pytest.raises(error, match=text):
        cluster.run(misbehave(how), {"a.tar": SimpleNamespace(samples=[0])}, quiet=True)


def test_a_shard_on_a_nodes_own_disk_is_missed(photos, tmp_path, monkeypatch):
    def elsewhere(work, items, **_):
        return {name: {"shard": {"bytes": 3}} for name in items}

    monkeypatch.setattr(cluster, "run", elsewhere)
    with pytest.raises(UserError, match=r"train-00000\.tar was written by another node .* the nodes must share"):
        write(photos, tmp_path / "x", 1, "ray")


def test_the_command_says_which_cluster_and_shows_progress(ray, tmp_path):
    words = ["tools/shards.py", "write", "--dataset", "digits", "--out", tmp_path / "digits", "--executor"]
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = command(*words, "ray", env=address)
    assert done.returncode == 0, done.stderr
    assert "Ray: 1 node(s), 2 CPUs" in done.stderr and "1797/1797" in done.stderr
    words[5] = tmp_path / "other"
    done = command(*words, "rya")
    assert done.returncode == 2 and "nearest: ray" in done.stderr
