"""Supervised training of a timm classifier: python examples/timm_classifier.py shards/x

One view an image: random crop and flip to train on, the clean centre view to test on.
"""

import argparse

import timm
import torch
import torch.nn.functional as F

import manyview


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--pretrained", action="store_true", help="begin with timm's weights")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    statistics = {}  # of the images, by default this data's own; weights want those that they were trained with
    if args.pretrained:
        weights = timm.get_pretrained_cfg(args.network)
        statistics = {"mean": weights.mean, "std": weights.std}
    train = manyview.Views(args.data, 1, args.batch_size, split="train", policy="supervised", **statistics)
    network = timm.create_model(args.network, pretrained=args.pretrained, num_classes=len(train.classes)).to(device)
    test = manyview.Views(
        args.data, split="val", batch_size=args.batch_size, size=train.size, mean=train.mean, std=train.std
    )
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)

    for epoch in range(args.epochs):
        network.train()
        for batch in train:
            loss = F.cross_entropy(network(batch.views[0]), batch.labels.to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        network.eval()
        with torch.inference_mode():
            hits = sum((network(b.views[0]).argmax(1).cpu() == b.labels).sum() for b in test)
        print(
            f"epoch {epoch + 1}: loss {loss.item():.4f}, {hits / len(test.store):.2%} of {len(test.store)} test images right"
        )


if __name__ == "__main__":
    main()
