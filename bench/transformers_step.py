"""What a training step of a model of Transformers holds at its peak: python bench/transformers_step.py prints a table.

    Transformers' own loss      model(ids, labels=ids).loss, which copies the logits to float32
    softxent, in F.cross_entropy's place within it
    F.cross_entropy             of the logits as they are, and labels that are shifted instead
    softxent, slice             of logits[:, :-1].flatten(0, 1), which is a copy
    softxent                    as F.cross_entropy
    softxent, in place          the same with inplace=True

Torch's own memory events, above what was there when the step began, in multiples of the logits in the model's dtype.
The outputs, with the logits, are held until the step ends, as in `outputs = model(ids)`; the weights' gradients were
there before. The model is a tiny Llama of random weights: nothing is downloaded.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    root = Path(__file__).parents[1]
    sys.path[:0] = [str(root), str(root / "kernels"), str(root / "tests")]

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.machine import cpu_model
from memory import peak_bytes
from softxent import fused_softmax_xent

Loss = Callable[[Tensor, Tensor], Tensor]
BATCH, TOKENS = 4, 256


def shifted(loss: Callable[..., Tensor], **options: Any) -> Loss:
    def of(logits: Tensor, ids: Tensor) -> Tensor:
        labels = F.pad(ids, (0, 1), value=-100)[:, 1:]
        return loss(logits.flatten(0, 1), labels.flatten(), **options)

    return of


def of_a_slice(logits: Tensor, ids: Tensor) -> Tensor:
    return fused_softmax_xent(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


LOSSES: dict[str, Loss | None] = {  # None: the model's own
    "Transformers' own loss": None,
    "softxent, in F.cross_entropy's place within it": None,
    "F.cross_entropy": shifted(F.cross_entropy),
    "softxent, slice": of_a_slice,
    "softxent": shifted(fused_softmax_xent),
    "softxent, in place": shifted(fused_softmax_xent, inplace=True),
}


def llama(dtype: torch.dtype) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).train()


def step(model: Any, ids: Tensor, loss_of: Loss | None) -> Tensor:
    """The loss, detached, of one step without an optimizer's."""
    outputs = model(ids, labels=ids) if loss_of is None else model(ids)
    loss = outputs.loss if loss_of is None else loss_of(outputs.logits, ids)
    loss.backward()
    return loss.detach()  # type: ignore[no-any-return]


def peaks(model: Any) -> dict[str, str]:
    """Of each way to the loss: the peak in logits, and the loss."""
    vocabulary, dtype = model.config.vocab_size, model.dtype
    ids = torch.randint(vocabulary, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    logits = ids.numel() * vocabulary * dtype.itemsize
    found = {}
    for name, loss_of in LOSSES.items():
        patched = fused_softmax_xent if "place within" in name else F.cross_entropy
        with patch.object(F, "cross_entropy", patched):
            loss = step(model, ids, loss_of)  # the gradients are there
            found[name] = f"{peak_bytes(partial(step, model, ids, loss_of)) / logits:.2f} ({loss.item():.4f})"
    return found


def main() -> None:
    import transformers

    print(f"{cpu_model()}, torch {torch.__version__}, Transformers {transformers.__version__}")
    columns = [peaks(llama(dtype)) for dtype in (torch.bfloat16, torch.float32)]
    print(f"\n{BATCH} x {TOKENS} tokens: peak in logits, and the loss\n")
    print("| | bfloat16 | float32 |\n|---|---:|---:|")
    for way in LOSSES:
        print(f"| {way} | {columns[0][way]} | {columns[1][way]} |")


if __name__ == "__main__":
    main()
