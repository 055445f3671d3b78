"""Views in a plain torch loop, and exact resuming: python examples/torch_loop.py shards/x

On several GPUs: torchrun --nproc_per_node=8 examples/torch_loop.py shards/x
"""

import os
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import tyro
from torch import nn

import manyview


def main(
    shards: tyro.conf.Positional[str],
    network: str = "resnet18",
    views: int = 8,
    batch_size: int = 64,
    epochs: int = 1,
    checkpoint: Path = Path("torch_loop.pt"),
) -> None:
    """:param batch_size: images a process"""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if ranks := "RANK" in os.environ:
        dist.init_process_group()
    trunk = timm.create_model(network, num_classes=0)
    model = nn.Sequential(trunk, manyview.Projector(trunk.num_features, 256)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if ranks else model

    with manyview.Views(shards, views, batch_size, seed=0) as data:
        parts = {"network": model, "optimizer": optimizer, "data": data}
        if checkpoint.exists():
            for name, state in torch.load(checkpoint, device, weights_only=True).items():
                parts[name].load_state_dict(state)
        while data.epoch < epochs:
            for batch in data:
                loss = manyview.barlow(manyview.encode(wrapped, batch.views)).total
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if not ranks or dist.get_rank() == 0:
                print(f"epoch {data.epoch}: loss {loss.item():.4f}, {len(data)} batches of {tuple(batch.views.shape)}")
                torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)
    if ranks:
        dist.destroy_process_group()


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
