"""Lightning: an optimizer of tare in configure_optimizers, Lightning's own checkpoint and resume, release mode with accumulation.

pip install lightning; python examples/lightning_module.py
"""

import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tare


class Net(lightning.LightningModule):
    """A classifier. release: steps inside backward."""

    def __init__(self, release: bool = False) -> None:
        super().__init__()
        self.release, self.last = release, False
        self.net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        storage = tare.Storage(moment="int8", min_quantized=256)
        optimizer = tare.GaLore(self.net, lr=1e-2, rank=8, period=4, release=self.release, storage=storage)
        optimizer.accumulate_while(lambda: not self.last)  # only release mode asks
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_step(self, *args: Any, **named: Any) -> None:
        """Lightning runs the last backward of a step in here, and those before it elsewhere."""
        self.last = True
        try:
            super().optimizer_step(*args, **named)
        finally:
            self.last = False


def fit(folder: Path, release: bool, epochs: int, checkpoint: str | None = None) -> tuple[Net, lightning.Trainer]:
    """Train up to a number of epochs of six steps, from a checkpoint where one is given: of an epoch's end, see docs/integrations.md."""
    torch.manual_seed(0)
    x = torch.randn(96, 16, generator=torch.Generator().manual_seed(1))
    trainer = lightning.Trainer(
        max_epochs=epochs, accumulate_grad_batches=2, default_root_dir=folder, accelerator="cpu", logger=False,
        gradient_clip_val=None if release else 1.0, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    net = Net(release)
    trainer.fit(net, DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=8), ckpt_path=checkpoint)
    return net, trainer


def main(folder: Path, release: bool = False) -> tuple[Net, Net]:
    """Train two epochs; and one, then one more from Lightning's checkpoint. Returns both nets."""
    whole, _ = fit(folder, release, 2)
    _, trainer = fit(folder, release, 1)
    trainer.save_checkpoint(folder / "last.ckpt")
    resumed, _ = fit(folder, release, 2, str(folder / "last.ckpt"))
    same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    print(f"release {release}: the resumed run has the same bits: {same}")
    return whole, resumed


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
        main(Path(place), release=True)
