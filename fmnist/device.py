"""The device to train on, and why that one."""

import torch

from .errors import UserError

CHOICES = ("auto", "cpu", "cuda", "mps")


def choose(name: str) -> tuple[torch.device, str]:
    """The device for `name`, one of CHOICES, and the reason in words. UserError if it is not there."""
    if name == "cpu":
        return torch.device("cpu"), "asked for"
    if torch.cuda.is_available() and name in ("auto", "cuda"):
        major, minor = torch.cuda.get_device_capability()
        return torch.device("cuda"), f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    if name == "mps":
        if torch.backends.mps.is_available():
            return torch.device("mps"), "asked for; the loss runs in torch operations, Triton has no Metal backend"
        raise UserError(f"--device mps: torch {torch.__version__} sees no Apple GPU")
    reason = f"torch {torch.__version__} sees no CUDA GPU"
    if name == "cuda":
        raise UserError(f"--device cuda: {reason}")
    return torch.device("cpu"), reason
