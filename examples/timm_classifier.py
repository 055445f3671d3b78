"""Supervised training of a timm classifier: python examples/timm_classifier.py shards/x

One view an image: random crop and flip to train on, the clean centre view to test on.
"""

import timm
import torch
import torch.nn.functional as F
import tyro

import manyview


def main(
    shards: tyro.conf.Positional[str],
    network: str = "resnet18",
    pretrained: bool = False,
    batch_size: int = 64,
    epochs: int = 1,
) -> None:
    """:param pretrained: begin with timm's weights"""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    statistics = {}  # of the images, by default this data's own; weights want those that they were trained with
    if pretrained:
        weights = timm.get_pretrained_cfg(network)
        statistics = {"mean": weights.mean, "std": weights.std}
    train = manyview.Views(shards, 1, batch_size, split="train", policy="supervised", **statistics)
    model = timm.create_model(network, pretrained=pretrained, num_classes=len(train.classes)).to(device)
    test = manyview.Views(shards, split="val", batch_size=batch_size, size=train.size, mean=train.mean, std=train.std)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    for epoch in range(epochs):
        model.train()
        for batch in train:
            loss = F.cross_entropy(model(batch.views[0]), batch.labels.to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            hits = sum((model(b.views[0]).argmax(1).cpu() == b.labels).sum() for b in test)
        n = len(test.store)
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, {hits / n:.2%} of {n} test images right")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
