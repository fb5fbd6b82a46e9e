"""Image files as the models take them: 28 x 28 grey levels, light on black. What is something else is refused.

Nothing is scaled, cropped or averaged to fit: the classes would be those of an image that nobody has seen.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError
from .models import SIDE

KINDS = ("1", "L", "P", "LA", "RGB", "RGBA")  # Pillow's modes of up to 8 bits a channel


def read(path: Path) -> np.ndarray:
    """The grey levels of a file in any format that Pillow reads, [28, 28] uint8.

    Raises UserError for a file that holds no image, for another size, and for colours, transparency, and more bits.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError("reading images needs Pillow: pip install pillow") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is refused below, unread
            file = Image.open(path)
        with file as image:
            if image.size != (SIDE, SIDE):
                raise UserError(f"{path} is {image.width} x {image.height} pixels, not {SIDE} x {SIDE}")
            return _grey(image, path)
    except FileNotFoundError as error:
        raise UserError(f"the image {path} does not exist") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not an image, or not a whole one ({type(error).__name__})") from error


def _grey(image: Any, path: Path) -> np.ndarray:
    if image.mode not in KINDS:
        raise UserError(f"{path} is an image of the kind {image.mode!r}, not of 8 bit grey levels")
    channels: np.ndarray = np.asarray(image.convert("RGBA"))
    red, green, blue, alpha = (channels[:, :, i] for i in range(4))
    if (alpha < 255).any():
        raise UserError(f"{path} is transparent in places: put it on a black background")
    if (red != green).any() or (red != blue).any():
        raise UserError(f"{path} is in colour: make it grey")
    return red


def looks_inverted(image: np.ndarray) -> bool:
    """Whether the border of an image [28, 28] is light: Fashion-MNIST's is dark, in each of its 70,000 images."""
    border = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    return bool(border.mean() > 127)
