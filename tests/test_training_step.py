"""Chunks of views against the whole, global batch-norm against one process, sums over ranks against one batch."""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from manyview.model import backbone, objective
from manyview.model.projector import Projector
from manyview.pipeline import views
from manyview.pipeline.engines.cpu import CPUEngine
from manyview.pipeline.errors import UserError
from manyview.pipeline.store import Store
from manyview.training.step import (
    GlobalBatchNorm,
    PretrainingModel,
    RunningStatistics,
    backward,
    backward_chunked,
    embed,
    frozen_statistics,
    local_views,
    not_finite,
    synchronize_batchnorm,
)


def encoder(dropout: float = 0.0, network: str = "resnet10-narrow") -> PretrainingModel:
    torch.manual_seed(0)
    trunk = backbone.create(network, image_size=16)
    head = Projector(trunk.num_features, 8, 8)
    head.insert(3, nn.Dropout(dropout))
    return PretrainingModel(trunk, head).double()


def gradients(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def statistics(module: nn.Module) -> torch.Tensor:
    return torch.cat([b.double().flatten() for b in module.buffers()])


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


@pytest.mark.parametrize(("chunk", "dropout"), [(1, 0.0), (2, 0.5), (4, 0.0)])
def test_chunks_give_the_same_gradient_loss_and_statistics(chunk, dropout):
    x = [torch.randn(5, 6, 3, 16, 16, dtype=torch.float64), torch.randn(3, 6, 3, 8, 8, dtype=torch.float64)]
    loss_of = objective.create("barlow")
    whole, cut = encoder(dropout), encoder(dropout)
    torch.manual_seed(1)
    a, za = backward(whole, x, loss_of, identity, True, contextlib.nullcontext)
    torch.manual_seed(1)
    b, zb = backward_chunked(cut, x, loss_of, identity, chunk, contextlib.nullcontext)
    torch.testing.assert_close(a.total, b.total, rtol=1e-12, atol=0)
    torch.testing.assert_close(za, zb)
    torch.testing.assert_close(gradients(whole), gradients(cut), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(statistics(whole), statistics(cut))


def test_pooled_statistics_cannot_be_cut():
    """Why --view-chunk asks for --bn view: the pooled network is another function."""
    x = torch.randn(4, 6, 3, 16, 16, dtype=torch.float64) * torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1, 1, 1)
    model = encoder()
    assert not torch.allclose(embed(model, x, per_view=True), embed(model, x, per_view=False), atol=1e-3)


def test_frozen_statistics_restores_tracking():
    model = encoder()
    before = statistics(model)
    with frozen_statistics(model):
        model(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)
    model(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    assert not torch.equal(statistics(model), before)


CASES = [  # processes, statistics per view, chunk, network
    (2, False, 0, "resnet10-narrow"),
    (3, True, 0, "resnet10-narrow"),
    (2, True, 1, "resnet10-narrow"),
    (2, False, 0, "mobilenetv3_small_050"),  # batch-norms with the activation inside
    (2, True, 1, "mobilenetv3_small_050"),
]


def whole_batch() -> torch.Tensor:
    return torch.randn(2, 12, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def one_rank(rank: int, folder: Path) -> None:
    """Every case that has this rank, one after the other: starting processes is what takes time."""
    torch.set_num_threads(1)
    for number, (world, per_view, chunk, network) in enumerate(CASES):
        if rank >= world:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{number}", rank=rank, world_size=world)
        model = encoder(network=network)
        synchronize_batchnorm(model, torch.device("cpu"))
        assert any(isinstance(m, GlobalBatchNorm) for m in model.modules())
        wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        mine, loss_of = [whole_batch().chunk(world, 1)[rank]], objective.create("barlow")
        if chunk:
            loss, _ = backward_chunked(wrapped, mine, loss_of, identity, chunk, contextlib.nullcontext)
        else:
            loss, _ = backward(wrapped, mine, loss_of, identity, per_view, contextlib.nullcontext)
        if rank == 0:
            np.savez(
                folder / f"{number}.npz",
                total=float(loss.total.detach()),
                grad=gradients(model),
                stats=statistics(model),
            )
        del wrapped
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def rank0(tmp_path_factory) -> Path:
    """What rank 0 had, a file a case."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(one_rank, (folder,), nprocs=3)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_ranks_equal_one_process_on_the_whole_batch(rank0, number):
    _, per_view, _, network = CASES[number]
    single = encoder(network=network)
    loss, _ = backward(single, [whole_batch()], objective.create("barlow"), identity, per_view, contextlib.nullcontext)
    there = np.load(rank0 / f"{number}.npz")
    assert abs(float(there["total"]) - float(loss.total.detach())) < 1e-10 * abs(float(loss.total.detach()))
    torch.testing.assert_close(torch.from_numpy(there["grad"]), gradients(single), rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(torch.from_numpy(there["stats"]), statistics(single), rtol=1e-9, atol=1e-12)


def test_global_batch_norm_without_ranks_is_left_alone():
    model = copy.deepcopy(encoder())
    assert synchronize_batchnorm(model, torch.device("cpu")) is model
    assert not any(isinstance(m, GlobalBatchNorm) for m in model.modules())


@pytest.fixture
def one_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("network", ["resnet10-narrow", "mobilenetv3_small_050"])
def test_synchronized_networks_are_the_same_function(one_process_group, network, device):
    """What several processes train is what one trains: torch's own conversion would drop timm's activations."""
    model = encoder(network=network).eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    before, names = model(x), list(model.state_dict())
    after = synchronize_batchnorm(model, torch.device(device))
    torch.testing.assert_close(after(x), before, rtol=1e-12, atol=0)
    assert list(after.state_dict()) == names
    kind = GlobalBatchNorm if device == "cpu" else nn.SyncBatchNorm
    norms = [m for m in after.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, kind) for m in norms)


def test_chunks_exchange_gradients_once_a_step(one_process_group):
    """Between ranks gradients travel with the last chunk alone, whatever the number of chunks."""
    exchanges = []

    def hook(_, bucket):
        exchanges.append(bucket.is_last())
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model = encoder()
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped.register_comm_hook(None, hook)
    x = [torch.randn(4, 6, 3, 16, 16, dtype=torch.float64)]
    for steps in (1, 2):
        backward_chunked(wrapped, x, objective.create("barlow"), identity, 1, contextlib.nullcontext)
        assert sum(exchanges) == steps


@pytest.mark.parametrize("size", [4, 8])
def test_local_crops_are_local_by_their_role_not_by_their_size(digits, size):
    store = Store(digits)
    policy = views.policy("multicrop", 5, 8, {"local.size": size})
    ids = np.arange(4)
    engine = CPUEngine(store)
    batch = engine(ids, views.parameters(policy, 0, ids * 0, ids, store.heights[ids], store.widths[ids]))
    engine.close()
    assert local_views(batch) == [False, False, True, True, True]


def test_an_unknown_batch_norm_is_refused_by_name(one_process_group):
    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(UserError, match="0 is a Own"):
        synchronize_batchnorm(nn.Sequential(Own(3)), torch.device("cpu"))


def test_a_skipped_step_leaves_the_running_statistics():
    model = encoder()
    kept = RunningStatistics(model)
    model(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    kept.settle(torch.tensor(False))
    before = statistics(model)
    model(torch.full((4, 3, 16, 16), math.inf, dtype=torch.float64))
    assert statistics(model).isnan().any()
    kept.settle(torch.tensor(True))
    floats = [b for b in model.buffers() if b.is_floating_point()]
    assert all(b.isfinite().all() for b in floats)
    model(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    kept.settle(torch.tensor(False))
    assert not torch.equal(statistics(model), before)
    RunningStatistics(nn.Linear(2, 2)).settle(torch.tensor(True))


def test_a_step_is_bad_by_its_loss_or_by_any_gradient():
    layer = nn.Linear(2, 2)
    for name, value, loss, bad in (
        ("fine", 1.0, 1.0, False),
        ("large", 1e30, 1.0, False),  # its square is not, in fp32
        ("nan", math.nan, 1.0, True),
        ("inf", -math.inf, 1.0, True),
        ("infinities of both signs", [math.inf, -math.inf], 1.0, True),  # whose sum is not infinite
        ("loss", 1.0, math.inf, True),
    ):
        layer.weight.grad = torch.ones(2, 2)
        layer.bias.grad = torch.tensor(value if isinstance(value, list) else [1.0, value])
        assert bool(not_finite(torch.tensor(loss), layer)) is bad, name
