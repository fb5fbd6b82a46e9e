"""Image files as the models take them: 28 x 28 grey levels, light on black. What is something else is refused.

Unless it is asked for, nothing is scaled, cropped or averaged to fit: the classes would be those of an image that
nobody has seen. `fit` makes an image of any photograph, step by step as the images of the data set were made (Xiao,
Rasul and Vollgraf, 2017, section 2): grey, margins cut off, the longer side made 28 pixels, centred, light on black.
Theirs lay on white. What another lies on is taken for black, whatever its grey.
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
MARGIN = 32  # grey levels: what differs less from the ground is ground
DETAIL = 512  # pixels of the longer side: more would be thrown away in any case


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
    return _opened(path, lambda image: _fitted(image, path))


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
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has more pixels than Pillow takes: make it smaller") from error
    except (OSError, SyntaxError, ValueError) as error:
        if path.suffix.lower() in (".heic", ".heif"):
            raise UserError(f"{path} is of a format that Pillow does not read: export it as JPEG") from error
        raise UserError(f"{path} is not an image, or not a whole one ({type(error).__name__})") from error


def _fitted(image: Any, path: Path) -> tuple[np.ndarray, str]:
    from PIL import Image, ImageOps

    longest, done = max(image.size), [f"{image.width} x {image.height} made grey"]
    image.draft(None, (DETAIL, DETAIL))  # of a large JPEG no more is decoded than will be looked at
    grey = _made_grey(ImageOps.exif_transpose(image))  # a phone stores how it was held, not the image turned
    if grey.size == (SIDE, SIDE):  # cut and centred by whoever made it so
        inverted = looks_inverted(np.asarray(grey))
        return np.asarray(ImageOps.invert(grey) if inverted else grey), ", ".join(done + ["inverted"] * inverted)
    grey.thumbnail((DETAIL, DETAIL), Image.Resampling.BOX)
    levels, stands_out, inverted = _on_black(grey)
    if not stands_out.any():
        raise UserError(f"nothing in {path} stands out from its edges: the thing must lie whole on a plain ground")
    if inverted:
        done.append("inverted")
    if _border(stands_out).mean() > 0.25:
        done.append("no plain ground around it")
    rows, columns = (np.flatnonzero(stands_out.any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    thing = Image.fromarray(levels[box])
    if thing.size != grey.size:
        done.append("cut to {} x {}".format(*(round(side * longest / max(grey.size)) for side in thing.size)))
    if len(rows) < thing.height or len(columns) < thing.width:  # ground from edge to edge between two parts
        done.append("in parts where the model knows one thing")
    width, height = (max(1, round(SIDE * side / max(thing.size))) for side in thing.size)
    canvas = Image.new("L", (SIDE, SIDE))
    small = thing.resize((width, height), Image.Resampling.BOX)
    canvas.paste(small, ((SIDE - width) // 2, (SIDE - height) // 2))
    return np.asarray(canvas), ", ".join([*done, f"resized to {width} x {height}"])


def _on_black(grey: Any) -> tuple[np.ndarray, np.ndarray, bool]:
    """The thing light, what it lies on black, [h, w] uint8; where it stands out, bool; whether it is the darker."""
    from PIL import ImageFilter

    ground = float(np.median(_border(np.asarray(grey))))
    smooth = grey.filter(ImageFilter.GaussianBlur(max(grey.size) / DETAIL))  # a speck is no thing
    contrast = np.asarray(smooth, np.float32) - ground
    stands_out = np.abs(contrast) > MARGIN
    inverted = bool(contrast[stands_out].sum() < 0)
    range_ = -ground if inverted else 255 - ground
    levels = (np.asarray(grey, np.float32) - ground) / (range_ or 1) * 255
    return np.where(stands_out, levels.clip(0, 255), 0).round().astype(np.uint8), stands_out, inverted


def _made_grey(image: Any) -> Any:
    """An image of any of Pillow's modes in 8 bits; where it is transparent, there is a ground to stand out from."""
    from PIL import Image

    if image.mode[0] in "IF":  # more bits, or fractions: the brightest is white
        deep = np.asarray(image, np.float32)
        return Image.fromarray((deep * (255 / max(deep.max(), 1e-9))).clip(0, 255).astype(np.uint8))
    whole = image.convert("RGBA")
    grey, cover = whole.convert("L"), whole.getchannel("A")
    thing = np.asarray(grey)[np.asarray(cover) > 127]
    ground = Image.new("L", grey.size, 0 if thing.size and thing.mean() > 127 else 255)
    return Image.composite(grey, ground, cover)


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
