"""lightly's heads and losses on our views: python examples/lightly_loss.py shards/x

lightly's losses take two views. With more, each is held against the mean of the others' losses: all pairs with the first.
"""

import argparse

import timm
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from torch import nn

import manyview


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trunk = timm.create_model(args.network, num_classes=0)
    network = nn.Sequential(trunk, SimCLRProjectionHead(trunk.num_features, trunk.num_features, 128)).to(device)
    contrast = NTXentLoss(temperature=0.5)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)

    with manyview.Views(args.data, views=args.views, batch_size=args.batch_size, seed=0) as data:
        for epoch in range(args.epochs):
            for batch in data:
                first, *others = manyview.encode(network, batch.views)
                loss = torch.stack([contrast(first, other) for other in others]).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            print(f"epoch {epoch + 1}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
