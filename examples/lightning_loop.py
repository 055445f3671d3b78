"""Views in a Lightning module: python examples/lightning_loop.py shards/x

`Views` takes the place of the DataLoader. It tells the ranks apart by itself, and its position is in Lightning's checkpoints.
"""

import argparse

import pytorch_lightning as L  # or: import lightning as L
import timm
import torch

import manyview


class BarlowTwins(L.LightningModule):
    def __init__(self, network: str):
        super().__init__()
        self.backbone = timm.create_model(network, num_classes=0)
        self.projector = manyview.Projector(self.backbone.num_features, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projector(self.backbone(x))

    def training_step(self, batch: manyview.Batch, index: int) -> torch.Tensor:
        loss = manyview.barlow(manyview.encode(self, batch.views)).total
        self.log("loss", loss, prog_bar=True, batch_size=len(batch.ids))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64, help="images a process")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--out", default="lightning")
    parser.add_argument("--resume", help="a checkpoint, also one of the middle of an epoch")
    args = parser.parse_args()

    L.seed_everything(0)
    data = manyview.Views(args.data, views=args.views, batch_size=args.batch_size, seed=0)
    trainer = L.Trainer(max_epochs=args.epochs, default_root_dir=args.out, logger=False, enable_progress_bar=False)
    trainer.fit(BarlowTwins(args.network), data, ckpt_path=args.resume)
    print(f"{trainer.global_step} steps, loss {trainer.callback_metrics['loss']:.4f}")


if __name__ == "__main__":
    main()
