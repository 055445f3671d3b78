"""Views with Hugging Face accelerate: accelerate launch examples/accelerate_loop.py shards/x

`prepare` takes network and optimizer; `Views` tells the ranks apart by itself and is saved and resumed with the rest.
"""

import argparse
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from torch import nn

import manyview


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64, help="images a process")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("accelerate"))
    args = parser.parse_args()

    accelerator = Accelerator()
    trunk = timm.create_model(args.network, num_classes=0)
    network: nn.Module = nn.Sequential(trunk, manyview.Projector(trunk.num_features, 256))
    network, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters(), 1e-3))
    data = manyview.Views(args.data, args.views, args.batch_size, device=str(accelerator.device))
    accelerator.register_for_checkpointing(data)
    if (args.out / "custom_checkpoint_0.pkl").exists():
        accelerator.load_state(args.out)

    step = data.state_dict()["step"]
    while step < args.steps:
        for batch in data:
            with accelerator.autocast():
                z = manyview.encode(network, batch.views)
            accelerator.backward(manyview.barlow(z).total)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == args.steps:
                break
    accelerator.save_state(args.out)
    accelerator.print(f"{step} steps, saved in {args.out}")


if __name__ == "__main__":
    main()
