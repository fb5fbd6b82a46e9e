"""Unsloth's Triton cross-entropy: fast_cross_entropy_loss, without its package, which sets other libraries up anew.

Logits come as [batch, sequence, classes]; the mean is over the targets that are not -100. Backward writes into a matrix
of its own; a release that writes over the logits, as earlier ones did, is found and gets no time.
"""

import logging
from typing import Any

import torch

from bench.cases import IGNORE_INDEX, Case
from bench.contenders import Contender, Function, need, only

MODULE = "unsloth.kernels.cross_entropy_loss"
LOGGER = logging.getLogger("unsloth")
STAND_INS: dict[str, dict[str, Any]] = {
    "transformers.models.llama.modeling_llama": {"logger": LOGGER, "LlamaRMSNorm": torch.nn.Module},
    "unsloth_zoo.log": {"logger": LOGGER},
    "unsloth_zoo.utils": {"Version": torch.torch_version.TorchVersion},
    "unsloth_zoo.loss_utils": {"patch_loss_functions": None, "post_patch_loss_function": None},
    "unsloth_zoo.temporary_patches.common": {"torch_compile": lambda function, **_: function},
}


def load(name: str, device_type: str) -> Contender:
    module, version = need(MODULE, "unsloth", device_type, alone=True, stand_ins=STAND_INS)
    assert IGNORE_INDEX == -100  # the only one it knows

    def make(case: Case) -> Function:
        only(case, "ignored")
        function: Any = module.fast_cross_entropy_loss
        return lambda logits, target: function(logits.unsqueeze(0), target.unsqueeze(0))

    return Contender(name, "cross_entropy", version, make)
