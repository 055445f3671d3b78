"""lightly's heads and losses on our views: python examples/lightly_loss.py shards/x

lightly's losses take two views. With more, each is held against the mean of the others' losses: all pairs with the first.
"""

import timm
import torch
import tyro
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from torch import nn

import manyview


def main(
    shards: tyro.conf.Positional[str], network: str = "resnet18", views: int = 4, batch_size: int = 64, epochs: int = 1
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trunk = timm.create_model(network, num_classes=0)
    model = nn.Sequential(trunk, SimCLRProjectionHead(trunk.num_features, trunk.num_features, 128)).to(device)
    contrast = NTXentLoss(temperature=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    with manyview.Views(shards, views, batch_size, seed=0) as data:
        for epoch in range(epochs):
            for batch in data:
                first, *others = manyview.encode(model, batch.views)
                loss = torch.stack([contrast(first, other) for other in others]).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            print(f"epoch {epoch + 1}: loss {loss.item():.4f}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
