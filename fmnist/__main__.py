"""python -m fmnist: train softmax regression on Fashion-MNIST, and evaluate what was trained."""

import argparse
import io
import sys
from dataclasses import fields
from pathlib import Path

import torch

from . import checkpoint, data, device
from .errors import UserError
from .models import MODELS
from .train import LOSSES, Config, Split, evaluate, train


def _positive(kind: type) -> object:
    def parse(text: str) -> int | float:
        value: int | float = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise ValueError
    return value


_seed.__name__ = "seed"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fmnist", description=__doc__.split(": ", 1)[1])
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = Config()

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", choices=device.CHOICES, default=defaults.device)
    common.add_argument(
        "--data",
        metavar="DIR",
        help="folder with the four IDX files, .gz or not, or 'sample' for the embedded sample; default: $FMNIST_DATA, "
        "our cache, Debian's package, the net",
    )
    common.add_argument("--require-full-data", action="store_true", help="refuse the embedded sample")

    shown = argparse.ArgumentDefaultsHelpFormatter
    p = commands.add_parser("train", parents=[common], help="train and write runs/<name>/", formatter_class=shown)
    p.add_argument("--model", choices=MODELS, default=defaults.model)
    p.add_argument("--loss", choices=LOSSES, default=defaults.loss, help="softxent's op, or torch's F.cross_entropy")
    p.add_argument("--epochs", type=_positive(int), default=defaults.epochs)  # type: ignore[arg-type]
    p.add_argument("--batch-size", type=_positive(int), default=defaults.batch_size)  # type: ignore[arg-type]
    p.add_argument("--lr", type=_positive(float), default=defaults.lr, help="of SGD")  # type: ignore[arg-type]
    p.add_argument("--seed", type=_seed, default=defaults.seed, help="of the weights and of the order of the images")
    p.add_argument("--runs", metavar="DIR", default=defaults.runs, help="where the run's folder goes")
    p.add_argument("--name", help="of the run's folder; made from model, loss and time if not given")

    p = commands.add_parser("evaluate", parents=[common], help="loss and accuracy of a checkpoint on the test images")
    p.add_argument("--checkpoint", type=Path, required=True)
    p.add_argument("--model", choices=MODELS, help="refuse a checkpoint of another model")
    return parser


def main(argv: list[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # each epoch is seen when it is done, in a pipe too
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "train":
            train(Config(**{field.name: getattr(arguments, field.name) for field in fields(Config)}))
        else:
            _evaluate(arguments)
    except UserError as error:
        print(f"fmnist: {error}", file=sys.stderr)
        return 2
    return 0


def _evaluate(arguments: argparse.Namespace) -> None:
    place, why = device.choose(arguments.device)
    print(f"device: {place} ({why})")
    name, model = checkpoint.load(arguments.checkpoint, expect=arguments.model)
    dataset = data.load(arguments.data, arguments.require_full_data)
    split = Split(torch.tensor(dataset.test_images, device=place), torch.tensor(dataset.test_labels, device=place))
    loss, accuracy = evaluate(model.to(place), split)
    print(
        f"{name}: test loss {loss:.4f}, test accuracy {accuracy:.4f} on {len(split.labels)} images of {dataset.source}"
    )


if __name__ == "__main__":
    sys.exit(main())
