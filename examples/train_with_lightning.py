"""Lightning has no hook for the loss, and needs none: compute it in training_step.

Under bf16-mixed the logits arrive as bfloat16 and are read so; the loss is float32 under autocast, as PyTorch's is.
"""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from softxent import FusedSoftmaxXent

N_CLASSES = 10


class Classifier(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, N_CLASSES))
        # In place: nothing reads the logits after their loss, and a matrix of their size is saved.
        self.criterion = FusedSoftmaxXent(label_smoothing=0.1, inplace=True)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss: Tensor = self.criterion(self.model(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> tuple[float, float]:
    """The first loss and the last."""
    torch.manual_seed(0)
    y = torch.arange(512) % N_CLASSES
    x = torch.randn(N_CLASSES, 32)[y] + 0.5 * torch.randn(len(y), 32)
    model = Classifier()
    trainer = lightning.Trainer(
        max_epochs=3,
        precision="bf16-mixed",
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))
    return model.losses[0], model.losses[-1]


if __name__ == "__main__":
    print("loss from {:.3f} to {:.3f}".format(*main()))
