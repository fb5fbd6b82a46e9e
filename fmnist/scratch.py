"""Softmax regression from scratch (从零开始实现): tensors and arithmetic, no nn, no autograd, no optimizer.

    python -m fmnist.scratch [--data DIR] [--epochs 10] [--batch-size 256] [--lr 0.1] [--seed 1]

Read it from top to bottom beside the first note, whose sections are named on the way. With one seed it gives the curve
of `python -m fmnist train`, through either loss: the library's layers do nothing else.

The note's image has 2 x 2 pixels and is a dog, a cat or a chicken (分类问题). Here is one, with 12 weights and 3
biases:

>>> x = torch.tensor([1.0, 0.0, 2.0, 1.0])
>>> W = torch.tensor([[0.5, -1.0, 0.0], [0.0, 2.0, 1.0], [-0.5, 1.0, 0.0], [1.0, 0.0, -1.0]])
>>> b = torch.tensor([0.0, 0.5, 0.25])
>>> outputs_one_by_one(x.tolist(), W.tolist(), b.tolist()), (x @ W + b).tolist()
([0.5, 1.5, -0.75], [0.5, 1.5, -0.75])
>>> p = softmax(outputs(x[None], W, b))
>>> p
tensor([[0.2497, 0.6788, 0.0715]])
>>> ("dog", "cat", "chicken")[p.argmax()]
'cat'
"""

import argparse
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import arguments as take
from . import data
from .command import Parser, exit_code
from .errors import UserError

N_PIXELS, N_CLASSES = 28 * 28, 10


# The model: 权重矢量, 神经网络图, 计算效率


def outputs_one_by_one(x: list[float], W: list[list[float]], b: list[float]) -> list[float]:
    """o_j = x_1 w_1j + x_2 w_2j + ... + b_j, scalar by scalar (权重矢量), for x of length d, W [d, q] and b [q].

    Each output depends on every input: a fully connected layer (全连接层), and the only one (单层神经网络). Lists of
    Python's own numbers: taking a number out of a tensor costs some hundred times what multiplying it does.
    """
    return [sum(x[i] * W[i][j] for i in range(len(x))) + b[j] for j in range(len(b))]


def outputs(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """O = X W + b, a minibatch at once (小批量矢量计算表达式): X [n, d], W [d, q], b [q], O [n, q].

    b is added to each row by broadcasting (广播机制). The second note writes o = W x + b, with W [q, d] and x a column:
    the same numbers, transposed.
    """
    return X @ W + b


def parameters(seed: int) -> tuple[Tensor, Tensor]:
    """W [784, 10] ~ N(0, 0.01^2) and b [10] = 0, the very ones that `fmnist train` starts from with this seed."""
    torch.manual_seed(seed)
    torch.rand(N_CLASSES * N_PIXELS)  # nn.Linear draws W and b its own way first, which train then overwrites:
    torch.rand(N_CLASSES)  # these numbers of the generator are spent there, and so they are here
    W = torch.normal(0.0, 0.01, (N_CLASSES, N_PIXELS)).T.contiguous()  # nn.Linear keeps W transposed, [q, d]
    return W, torch.zeros(N_CLASSES)


# From outputs to probabilities: 输出问题, 规范化


def hardmax(logits: Tensor) -> Tensor:
    """1 for the greatest output of each row, 0 for the rest (hardmax): a decision, with no degree and no slope.

    >>> hardmax(torch.tensor([[0.1, 10.0, 0.1]]))
    tensor([[0., 1., 0.]])
    """
    return (torch.arange(logits.shape[1]) == logits.argmax(1, keepdim=True)).to(logits.dtype)


def naive_softmax(logits: Tensor) -> Tensor:
    """p_j = exp o_j / sum_k exp o_k (softmax运算符), row by row, as it is written: logits [n, q].

    The outputs' scale means nothing by itself (输出问题): 10 is sure in one row, and hopeless in the next.

    >>> naive_softmax(torch.tensor([[0.1, 10.0, 0.1]])).round(decimals=7)
    tensor([[5.0200e-05, 9.9990e-01, 5.0200e-05]])

    The note's other row is (10^3, 10, 10^3), printed as 103. exp 10^3 has 435 digits before the point, float32 holds 39
    (float64 309), so it is infinite, and infinity over infinity is not a number:

    >>> naive_softmax(torch.tensor([[1000.0, 10.0, 1000.0]]))
    tensor([[nan, 0., nan]])
    """
    powers = logits.exp()
    return powers / powers.sum(1, keepdim=True)


def softmax(logits: Tensor) -> Tensor:
    """The same p, with the row's greatest output m taken off first: exp(o_j - m) / sum_k exp(o_k - m).

    exp(-m) cancels in the fraction. No exponent is above 0 then, and nothing overflows:

    >>> softmax(torch.tensor([[0.1, 10.0, 0.1], [1000.0, 10.0, 1000.0]])).round(decimals=7)
    tensor([[5.0200e-05, 9.9990e-01, 5.0200e-05],
            [5.0000e-01, 0.0000e+00, 5.0000e-01]])
    """
    return naive_softmax(logits - logits.amax(1, keepdim=True))


def log_softmax(logits: Tensor) -> Tensor:
    """log p_j = o_j - m - log sum_k exp(o_k - m), without p.

    In the row above p_2 = exp(-990) / 2, which is 0 in any float, and its logarithm is lost. Not here:

    >>> softmax(torch.tensor([[1000.0, 10.0, 1000.0]])).log()
    tensor([[-0.6931,    -inf, -0.6931]])
    >>> log_softmax(torch.tensor([[1000.0, 10.0, 1000.0]])).round(decimals=2)
    tensor([[-6.9000e-01, -9.9069e+02, -6.9000e-01]])
    """
    shifted = logits - logits.amax(1, keepdim=True)
    return shifted - shifted.exp().sum(1, keepdim=True).log()


# The loss: 交叉熵损失函数


def cross_entropy(log_p: Tensor, labels: Tensor) -> Tensor:
    """-log p_y of each image: log_p [n, q], labels [n] int64, result [n], in nats.

    The sum -sum_j y_j log p_j over a one-hot y has one term that is not 0. It is picked out by index, not multiplied:

    >>> p = torch.tensor([[0.1, 0.3, 0.6], [0.3, 0.2, 0.5]])
    >>> cross_entropy(p.log(), torch.tensor([0, 2]))
    tensor([2.3026, 0.6931])
    """
    return -log_p.gather(1, labels[:, None])[:, 0]


def gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the mean cross-entropy, by the outputs: (p - y) / n, of shape [n, q].

    The loss of a row is log sum_k exp o_k - o_y. By o_j, the first term gives exp o_j / sum_k exp o_k = p_j, and the
    second gives 1 if j = y, else 0: what the model believes, less what it should have (softmax及其导数).

    >>> gradient(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([[ 0.5000, -0.5000]])
    """
    difference = softmax(logits)
    difference[torch.arange(len(labels)), labels] -= 1
    return difference / len(labels)


# Training and prediction: 模型训练和预测


def gradients_of_parameters(X: Tensor, dO: Tensor) -> tuple[Tensor, Tensor]:
    """By O = X W + b and the chain rule: dW = X^T dO [d, q], and db the sum of the rows of dO [q]."""
    return X.T @ dO, dO.sum(0)


def sgd(parameter: Tensor, gradient: Tensor, lr: float) -> None:
    """One step of minibatch stochastic gradient descent (小批量随机梯度下降), in place.

    The gradient is that of the mean over the minibatch, so nothing is divided by its size here.
    """
    parameter -= lr * gradient


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Right predictions argmax_j o_j over all predictions (准确率). softmax keeps the order: argmax o = argmax p.

    >>> accuracy(torch.tensor([[0.1, 0.3, 0.6], [0.3, 0.2, 0.5]]), torch.tensor([0, 2]))
    0.5
    """
    return (logits.argmax(1) == labels).double().mean().item()


def minibatches(n: int, batch_size: int, order: Tensor) -> Iterator[Tensor]:
    """The n images in this order (读取小批量), `batch_size` at a time: indices [batch_size], the last perhaps fewer."""
    for start in range(0, n, batch_size):
        yield order[start : start + batch_size]


def one_epoch(
    W: Tensor, b: Tensor, X: Tensor, labels: Tensor, batch_size: int, lr: float, order: Tensor
) -> tuple[float, float]:
    """Every image once. Changes W and b; returns loss and accuracy, each minibatch before its step.

    Losses are added up image by image and divided by their number once. (The PyTorch edition that the first note reads
    does so, too, in its section 3.6. In 3.7 it adds up means and divides all the same: those losses are 256 times too
    small.)
    """
    loss = right = 0.0
    for rows in minibatches(len(labels), batch_size, order):
        x, y = X[rows], labels[rows]
        logits = outputs(x, W, b)
        loss += cross_entropy(log_softmax(logits), y).sum().item()
        right += accuracy(logits, y) * len(y)
        dW, db = gradients_of_parameters(x, gradient(logits, y))
        sgd(W, dW, lr)
        sgd(b, db, lr)
    return loss / len(labels), right / len(labels)


def curve(dataset: data.FashionMNIST, epochs: int, batch_size: int, lr: float, seed: int) -> Iterator[dict[str, Any]]:
    """Train; a record an epoch, under the names of train's metrics.jsonl."""
    X, labels = as_tensors(dataset.train_images, dataset.train_labels)
    X_test, labels_test = as_tensors(dataset.test_images, dataset.test_labels)
    W, b = parameters(seed)
    shuffle = torch.Generator().manual_seed(seed)
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(labels), generator=shuffle)
        train_loss, train_accuracy = one_epoch(W, b, X, labels, batch_size, lr, order)
        logits = outputs(X_test, W, b)
        yield {
            "epoch": epoch,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": cross_entropy(log_softmax(logits), labels_test).mean().item(),
            "test_accuracy": accuracy(logits, labels_test),
        }
        if not math.isfinite(train_loss):
            raise UserError(f"the loss is {train_loss} in epoch {epoch}: try a smaller --lr than {lr}")


def as_tensors(images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Images [n, 28, 28] and labels [n] of uint8 as pixels [n, 784] float32 in [0, 1], and int64."""
    return torch.tensor(images).flatten(1).float() / 255, torch.tensor(labels).long()


def show_overflow() -> None:
    """The note's two rows through all three ways, as a table."""
    for row in ([0.1, 10.0, 0.1], [1000.0, 10.0, 1000.0]):
        print(f"outputs {row}")
        for name, way in (("naive softmax", naive_softmax), ("softmax", softmax), ("log-softmax", log_softmax)):
            print(f"    {name:14}" + "".join(f"{value:12.4g}" for value in way(torch.tensor([row]))[0].tolist()))
    print()


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m fmnist.scratch", description="softmax regression from scratch")
    parser.add_argument("--data", metavar="DIR", help="as of python -m fmnist train")
    parser.add_argument("--epochs", type=take.positive_int, default=10)
    parser.add_argument("--batch-size", type=take.positive_int, default=256)
    parser.add_argument("--lr", type=take.positive, default=0.1)
    parser.add_argument("--seed", type=take.seed, default=1)
    return exit_code(lambda: run(parser.parse_args(argv)))


def run(arguments: argparse.Namespace) -> None:
    dataset = data.load(arguments.data)
    show_overflow()
    print(f"{len(dataset.train_labels)} + {len(dataset.test_labels)} images from {dataset.source}")
    for record in curve(dataset, arguments.epochs, arguments.batch_size, arguments.lr, arguments.seed):
        print(
            f"epoch {record['epoch']:3d}  train loss {record['train_loss']:.4f}  "
            f"train accuracy {record['train_accuracy']:.4f}  test accuracy {record['test_accuracy']:.4f}"
        )


if __name__ == "__main__":
    sys.exit(main())
