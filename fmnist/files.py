"""Files that are whole or absent: tensors in safetensors, and text. Nothing here runs code from a file, as pickles do.

safetensors is a header in JSON and the tensors' bytes: https://huggingface.co/docs/safetensors.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import CannotWrite, UserError


def require_safetensors() -> Any:
    """The library; UserError if it is not installed, for a long run to ask before it begins."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise UserError("checkpoints need safetensors: pip install safetensors") from error
    return safetensors


@contextmanager
def whole(path: Path, by: str = "") -> Iterator[Path]:
    """A name to write to; what is there in the end replaces `path` in one step, or nothing does if it raises.

    The name keeps its suffix, by which some libraries choose the format. Where several may write the file, `by` tells
    them apart.
    """
    temporary = path.with_name(f".{by}partial.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The same, and CannotWrite where it cannot be written."""
    try:
        with whole(path) as temporary:
            yield temporary
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Of any shapes, dtypes and devices. CannotWrite where it cannot be written."""
    library = require_safetensors()
    with replacing(path) as temporary:
        content = library.torch.save({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, metadata)
        temporary.write_bytes(content)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the metadata. UserError if `path` holds no whole safetensors file."""
    library = require_safetensors()
    try:
        with library.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (library.SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a checkpoint, or not a whole one ({type(error).__name__})") from error
