"""Two and three processes against one: the same loss on every rank, and DDP's averaged gradient is the one of the
concatenated batch, in fp64 over gloo, for every objective and form."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from manyview.model import objective

BATCH, IN, DIM = 12, 5, 4  # 12 rows in all: 6 or 4 on each rank

CASES = {
    "barlow-mean": ("barlow", {"form": "mean"}),
    "barlow-cross": ("barlow", {"form": "cross"}),
    "barlow-pairs": ("barlow", {"form": "pairs"}),
    "barlow-mean-pooled": ("barlow", {"form": "mean", "standardize": "pooled"}),
    "barlow-cross-pooled": ("barlow", {"form": "cross", "standardize": "pooled"}),
    "barlow-pairs-pooled": ("barlow", {"form": "pairs", "standardize": "pooled"}),
    "vicreg": ("vicreg", {}),
    "vicreg-pooled": ("vicreg", {"form": "pooled"}),
    "spectral": ("spectral", {}),
    "paper": ("paper", {}),
}
VIEWS = (2, 4, 8)


def encoder(dim: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(IN, 7), nn.Tanh(), nn.Linear(7, dim)).double()


def data(views: int) -> Tensor:
    g = torch.Generator().manual_seed(views)
    shared = torch.randn(1, BATCH, IN, generator=g, dtype=torch.float64)
    return shared + 0.5 * torch.randn(views, BATCH, IN, generator=g, dtype=torch.float64)


def variants():
    """(key, objective, views, local, dim): dim 4 is narrower than a rank's rows, dim 9 wider than 4 but not than 12."""
    for name, (function, options) in CASES.items():
        for v in VIEWS:
            for dim in (DIM, 20):
                for local in (None, [i >= 2 for i in range(v)]):
                    yield f"{name} V={v} D={dim} local={local}", objective.create(function, **options), v, local, dim


def step(model: nn.Module, loss, x: Tensor, local) -> dict[str, Tensor]:
    model.zero_grad()
    result = loss(model(x.flatten(0, 1)).unflatten(0, x.shape[:2]), local=local)
    result.total.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {"loss": torch.stack(result).detach(), "gradient": gradient.clone()}


def worker(rank: int, folder: str) -> None:
    """Two processes, then three: starting them is what takes time."""
    torch.set_num_threads(1)
    for world in (world for world in (2, 3) if rank < world):
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
        models = {dim: DistributedDataParallel(encoder(dim)) for dim in (DIM, 20)}
        results = {}
        for key, loss, v, local, dim in variants():
            results[key] = step(models[dim], loss, data(v).chunk(world, dim=1)[rank], local)
        torch.save(results, f"{folder}/{rank}-of-{world}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    spawn(worker, args=(str(folder),), nprocs=3)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_has_the_single_process_loss_and_gradient(world, results):
    ranks = [torch.load(results / f"{rank}-of-{world}.pt") for rank in range(world)]
    models = {dim: encoder(dim) for dim in (DIM, 20)}
    checked = 0
    for key, loss, v, local, dim in variants():
        expected = step(models[dim], loss, data(v), local)
        assert expected["gradient"].abs().max() > 1e-3, key
        for rank in ranks:
            for what in ("loss", "gradient"):
                torch.testing.assert_close(rank[key][what], expected[what], rtol=1e-9, atol=1e-11, msg=f"{key} {what}")
        checked += 1
    assert checked == len(CASES) * len(VIEWS) * 4
