"""Views in a Lightning module: python examples/lightning_loop.py shards/x

`Views` takes the place of the DataLoader. It tells the ranks apart by itself, and its position is in Lightning's checkpoints.
"""

import pytorch_lightning as L  # or: import lightning as L
import timm
import torch
import tyro

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


def main(
    shards: tyro.conf.Positional[str],
    network: str = "resnet18",
    views: int = 8,
    batch_size: int = 64,
    epochs: int = 1,
    out: str = "lightning",
    resume: str | None = None,
) -> None:
    """:param batch_size: images a process
    :param resume: a checkpoint, also one of the middle of an epoch"""
    L.seed_everything(0)
    data = manyview.Views(shards, views, batch_size, seed=0)
    trainer = L.Trainer(max_epochs=epochs, default_root_dir=out, logger=False, enable_progress_bar=False)
    trainer.fit(BarlowTwins(network), data, ckpt_path=resume)
    print(f"{trainer.global_step} steps, loss {trainer.callback_metrics['loss']:.4f}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
