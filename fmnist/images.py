"""Image files as the models take them: 28 x 28 grey levels, light on black. What is something else is refused.

Unless it is asked for, nothing is scaled, cropped or averaged to fit: the classes would be those of an image that
nobody has seen. `fit` makes an image of any photograph, step by step as the images of the data set were made (Xiao,
Rasul and Vollgraf, 2017, section 2): grey, margins cut off, the longer side made 28 pixels, centred, light on black.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .errors import UserError
from .models import SIDE

KINDS = ("1", "L", "P", "LA", "RGB", "RGBA")  # Pillow's modes of up to 8 bits a channel
T = TypeVar("T")
MARGIN = 32  # grey levels: what differs less from the background is margin


def read(path: Path) -> np.ndarray:
    """The grey levels of a file in any format that Pillow reads, [28, 28] uint8.

    Raises UserError for a file that holds no image, for another size, and for colours, transparency, and more bits.
    """

    def as_it_is(image: Any) -> np.ndarray:
        if image.size != (SIDE, SIDE):
            size = f"{image.width} x {image.height}"
            raise UserError(f"{path} is {size} pixels, not {SIDE} x {SIDE}: --resize makes it so")
        return _grey(image, path)

    return _opened(path, as_it_is)


def fit(path: Path) -> tuple[np.ndarray, str]:
    """A photograph as [28, 28] uint8, and what was done to it, in words. UserError for a file that holds no image."""
    return _opened(path, _fitted)


def _opened(path: Path, use: Callable[[Any], T]) -> T:
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError("reading images needs Pillow: pip install pillow") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a size to refuse is refused unread
            file = Image.open(path)
        with file as image:
            return use(image)
    except FileNotFoundError as error:
        raise UserError(f"the image {path} does not exist") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not an image, or not a whole one ({type(error).__name__})") from error


def _fitted(image: Any) -> tuple[np.ndarray, str]:
    from PIL import Image, ImageOps

    done = [f"{image.width} x {image.height} made grey"]
    upright = ImageOps.exif_transpose(image)  # a phone stores how it was held, not the image turned
    on_white = Image.new("RGBA", upright.size, "white")
    on_white.alpha_composite(upright.convert("RGBA"))
    grey = on_white.convert("L")
    if looks_inverted(np.asarray(grey)):
        grey = ImageOps.invert(grey)
        done.append("inverted")
    if grey.size == (SIDE, SIDE):  # cut and centred by whoever made it so
        return np.asarray(grey), ", ".join(done)
    levels = np.asarray(grey)
    rows, columns = np.nonzero(levels > np.median(_border(levels)) + MARGIN)
    if len(rows):
        box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
        if box != (0, 0, *grey.size):
            grey = grey.crop(box)
            done.append(f"cut to {grey.width} x {grey.height}")
        thing = levels[box[1] : box[3], box[0] : box[2]] > np.median(_border(levels)) + MARGIN
        if not (thing.any(0).all() and thing.any(1).all()):  # background from edge to edge between two parts
            done.append("in parts where the model knows one thing")
    small = ImageOps.contain(grey, (SIDE, SIDE), Image.Resampling.BOX)
    canvas = Image.new("L", (SIDE, SIDE))
    canvas.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
    return np.asarray(canvas), ", ".join([*done, f"resized to {small.width} x {small.height}"])


def _grey(image: Any, path: Path) -> np.ndarray:
    if image.mode not in KINDS:
        raise UserError(f"{path} is an image of the kind {image.mode!r}, not of 8 bit grey levels")
    channels: np.ndarray = np.asarray(image.convert("RGBA"))
    red, green, blue, alpha = (channels[:, :, i] for i in range(4))
    if (alpha < 255).any():
        raise UserError(f"{path} is transparent in places: put it on a black background")
    if (red != green).any() or (red != blue).any():
        raise UserError(f"{path} is in colour: make it grey, or let --resize do it")
    return red


def looks_inverted(image: np.ndarray) -> bool:
    """Whether the border of an image [h, w] is light: Fashion-MNIST's is dark, in each of its 70,000 images."""
    return bool(_border(image).mean() > 127)


def _border(image: np.ndarray) -> np.ndarray:
    return np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
