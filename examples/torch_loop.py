"""Views in a plain torch loop, and exact resuming: python examples/torch_loop.py shards/x

On several GPUs: torchrun --nproc_per_node=8 examples/torch_loop.py shards/x
"""

import argparse
import os
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from torch import nn

import manyview


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64, help="images a process")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, default=Path("torch_loop.pt"))
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if ranks := "RANK" in os.environ:
        dist.init_process_group()
    trunk = timm.create_model(args.network, num_classes=0)
    network = nn.Sequential(trunk, manyview.Projector(trunk.num_features, 256)).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    wrapped = nn.parallel.DistributedDataParallel(network, broadcast_buffers=False) if ranks else network

    with manyview.Views(args.data, args.views, args.batch_size, seed=0) as data:
        parts = {"network": network, "optimizer": optimizer, "data": data}
        if args.checkpoint.exists():
            for name, state in torch.load(args.checkpoint, device, weights_only=True).items():
                parts[name].load_state_dict(state)
        while data.epoch < args.epochs:
            for batch in data:
                loss = manyview.barlow(manyview.encode(wrapped, batch.views)).total
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if not ranks or dist.get_rank() == 0:
                print(f"epoch {data.epoch}: loss {loss.item():.4f}, {len(data)} batches of {tuple(batch.views.shape)}")
                torch.save({name: part.state_dict() for name, part in parts.items()}, args.checkpoint)
    if ranks:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
