"""Views with Hugging Face accelerate: accelerate launch examples/accelerate_loop.py shards/x

`prepare` takes network and optimizer; `Views` tells the ranks apart by itself and is saved and resumed with the rest.
"""

from pathlib import Path

import timm
import torch
import tyro
from accelerate import Accelerator
from torch import nn

import manyview


def main(
    shards: tyro.conf.Positional[str],
    network: str = "resnet18",
    views: int = 8,
    batch_size: int = 64,
    steps: int = 100,
    out: Path = Path("accelerate"),
) -> None:
    """:param batch_size: images a process"""
    accelerator = Accelerator()
    trunk = timm.create_model(network, num_classes=0)
    model: nn.Module = nn.Sequential(trunk, manyview.Projector(trunk.num_features, 256))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-3))
    data = manyview.Views(shards, views, batch_size, device=str(accelerator.device))
    accelerator.register_for_checkpointing(data)
    if (out / "custom_checkpoint_0.pkl").exists():
        accelerator.load_state(out)

    step = data.state_dict()["step"]
    while step < steps:
        for batch in data:
            with accelerator.autocast():
                z = manyview.encode(model, batch.views)
            accelerator.backward(manyview.barlow(z).total)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == steps:
                break
    accelerator.save_state(out)
    accelerator.print(f"{step} steps, saved in {out}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
