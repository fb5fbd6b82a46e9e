"""timm, with mixup: the place of SoftTargetCrossEntropy and LabelSmoothingCrossEntropy.

Mixup makes probabilities of the labels, with the label smoothing in them: the target may be either.
loss_dtype: a loss of bfloat16 logits is bfloat16 otherwise, three digits of it.
"""

import timm
import torch
from timm.data import Mixup

from softxent import FusedSoftmaxXent

N_CLASSES = 10


def main() -> tuple[float, float]:
    """The first loss and the last, of the same images without mixup."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet.r160_in1k", pretrained=False, num_classes=N_CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    criterion = FusedSoftmaxXent(loss_dtype=torch.float32)  # of probabilities
    plain = FusedSoftmaxXent(label_smoothing=0.1, loss_dtype=torch.float32)  # of labels
    mixup = Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=N_CLASSES)
    y = torch.arange(64) % N_CLASSES
    x = torch.randn(N_CLASSES, 3, 32, 32)[y] + 0.1 * torch.randn(len(y), 3, 32, 32)
    with torch.no_grad():
        first = plain(model(x), y).item()
    for _ in range(30):
        images, target = mixup(x.clone(), y)  # target: (N, n_classes), float32
        optimizer.zero_grad()
        criterion(model(images), target).backward()
        optimizer.step()
    with torch.no_grad():
        return first, plain(model(x), y).item()


if __name__ == "__main__":
    print("loss from {:.3f} to {:.3f}".format(*main()))
