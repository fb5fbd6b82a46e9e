"""Ten epochs of softmax regression our way and the books' way, in one run: python bench/books.py [--epochs 3]

The books' way is that of "Dive into Deep Learning", section 3.6 and 3.7: torchvision's FashionMNIST with ToTensor, a
DataLoader with 4 workers, F.cross_entropy, the sums of loss and accuracy read after every batch. What torchvision does
for an image is written out here (an image of Pillow's from the array, and a tensor from that image), as torchvision is
not among our dependencies. Ours is what `python -m fmnist train` does.

Two figures: the training epochs alone, evaluation left out on both sides, and all of it, which for ours is the whole
command: the archives read and their checksums taken, checkpoints written, pictures drawn, none of which the books' way
is charged for. Ours runs before and after the other, and the slower of the two counts.
"""

import argparse
import contextlib
import io
import os
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).parents[1]
    sys.path[:0] = [str(root), str(root / "kernels")]

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fmnist.data
from fmnist import train
from fmnist.command import exit_code

BATCH_SIZE, LR = 256, 0.1


class Images(Dataset[tuple[Tensor, int]]):
    """As torchvision.datasets.FashionMNIST with transform=ToTensor(): item i is a [1, 28, 28] float32, and a label."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = torch.tensor(images), torch.tensor(labels).long()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image, label = self.images[i], int(self.labels[i])
        return to_tensor(Image.fromarray(image.numpy())), label


def to_tensor(image: Image.Image) -> Tensor:
    """torchvision.transforms.functional.to_tensor of a grey image, line for line."""
    pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
    pixels = pixels.view(image.size[1], image.size[0], 1).permute(2, 0, 1).contiguous()
    return pixels.to(dtype=torch.float32).div(255)


def books(dataset: fmnist.data.FashionMNIST, epochs: int, workers: int, seed: int = 1) -> tuple[float, float]:
    """Train the books' way; the seconds of the training epochs, and the test accuracy at the end."""
    torch.manual_seed(seed)
    training = Images(dataset.train_images, dataset.train_labels)
    test = Images(dataset.test_images, dataset.test_labels)
    batches = DataLoader(training, BATCH_SIZE, shuffle=True, num_workers=workers)
    test_batches = DataLoader(test, BATCH_SIZE, shuffle=False, num_workers=workers)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    nn.init.normal_(net[1].weight, std=0.01)  # type: ignore[arg-type]
    nn.init.zeros_(net[1].bias)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    seconds = accuracy = 0.0
    for _ in range(epochs):
        start = time.perf_counter()
        loss_sum = right_sum = 0.0
        for images, labels in batches:
            logits = net(images)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(labels)
            right_sum += (logits.argmax(1) == labels).sum().item()
        seconds += time.perf_counter() - start
        with torch.no_grad():
            right = sum((net(images).argmax(1) == labels).sum().item() for images, labels in test_batches)
        accuracy = right / len(test)
    return seconds, accuracy


def ours(data: str | None, epochs: int) -> tuple[float, float]:
    """The command's own function, with its output kept to itself; what `books` returns."""
    with tempfile.TemporaryDirectory() as runs, contextlib.redirect_stdout(io.StringIO()):
        config = train.Config(
            epochs=epochs, batch_size=BATCH_SIZE, lr=LR, data=data, device="cpu", runs=runs, require_full_data=not data
        )
        end = train.train(config)
    return end["seconds"], end["test_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=4, help="processes of the books' DataLoader")
    parser.add_argument("--data", metavar="DIR", help="as fmnist's; 'sample' to try the script")
    arguments = parser.parse_args()

    warnings.filterwarnings("ignore", message="This DataLoader will create")  # the books' number, whatever the machine
    dataset = fmnist.data.load(arguments.data, require_full=not arguments.data)
    print(
        f"softmax regression, {arguments.epochs} epochs of {len(dataset.train_labels)} images, batch {BATCH_SIZE}, CPU"
    )
    print(
        f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__} "
        f"({torch.get_num_threads()} threads), Pillow {PIL.__version__}, NumPy {np.__version__}\n"
    )
    runs = {
        "ours, before": lambda: ours(arguments.data, arguments.epochs),
        "the books' way": lambda: books(dataset, arguments.epochs, arguments.workers),
        "ours, after": lambda: ours(arguments.data, arguments.epochs),
    }
    training, everything = {}, {}
    print(f"{'':15} {'training':>10} {'all of it':>10}   test accuracy")
    for name, run in runs.items():
        start = time.perf_counter()
        training[name], accuracy = run()
        everything[name] = time.perf_counter() - start
        print(f"{name:15} {training[name]:8.2f} s {everything[name]:8.2f} s   {accuracy:.4f}", flush=True)
    for title, seconds in (("training", training), ("all of it", everything)):
        times = seconds["the books' way"] / max(seconds["ours, before"], seconds["ours, after"])
        print(f"{title}: the books' way takes {times:.1f} times as long as ours")


if __name__ == "__main__":
    sys.exit(exit_code(main))
