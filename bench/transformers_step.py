"""What a training step of a model of Transformers holds at its peak: python bench/transformers_step.py prints a table.

    Transformers' own loss      model(ids, labels=ids).loss, which copies the logits to float32
    softxent, in F.cross_entropy's place within it
    F.cross_entropy             of the logits as they are, and labels that are shifted instead
    softxent, slice             of logits[:, :-1].flatten(0, 1), which is a copy
    softxent                    as F.cross_entropy
    softxent, in place          the same with inplace=True

Torch's own memory events, above what was there when the step began, in multiples of the logits in the model's dtype.
The outputs, with the logits, are held until the step ends, as in `outputs = model(ids)`; --drop lets go of them before
backward. The gradients of the weights are there before. Models are tiny and of random weights: nothing is downloaded.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def models() -> dict[str, Callable[[], Any]]:
    import transformers

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = transformers.LlamaConfig(vocab_size=32000, num_key_value_heads=2, **small)
    gpt2 = transformers.GPT2Config(vocab_size=50257, n_embd=64, n_layer=2, n_head=2)
    return {
        "llama": lambda: transformers.LlamaForCausalLM(llama),
        "gpt2": lambda: transformers.GPT2LMHeadModel(gpt2),
    }


@contextmanager
def in_place_of_torchs(loss: Callable[..., Tensor]) -> Iterator[None]:
    torchs = F.cross_entropy
    F.cross_entropy = loss
    try:
        yield
    finally:
        F.cross_entropy = torchs


def step(model: Any, ids: Tensor, loss_of: Loss | None, drop: bool) -> Tensor:
    """The loss, detached, of one step without an optimizer's."""
    if loss_of is None:
        outputs = model(ids, labels=ids)
        loss = outputs.loss
    else:
        outputs = model(ids)
        loss = loss_of(outputs.logits, ids)
    if drop:
        del outputs
    loss.backward()
    return loss.detach()  # type: ignore[no-any-return]


def peaks(model: Any, drop: bool) -> dict[str, tuple[float, float]]:
    """Of each way to the loss: the peak in logits, and the loss."""
    vocabulary, dtype = model.config.vocab_size, model.dtype
    ids = torch.randint(vocabulary, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    logits = ids.numel() * vocabulary * dtype.itemsize
    found = {}
    for name, loss_of in LOSSES.items():
        patched = fused_softmax_xent if "place within" in name else F.cross_entropy
        with in_place_of_torchs(patched):
            loss = step(model, ids, loss_of, drop)  # the gradients are there
            found[name] = peak_bytes(lambda: step(model, ids, loss_of, drop)) / logits, loss.item()  # noqa: B023
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="llama,gpt2")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--drop", action="store_true", help="let go of the model's outputs before backward")
    arguments = parser.parse_args()
    import transformers

    print(f"{cpu_model()}, torch {torch.__version__}, Transformers {transformers.__version__}")
    for name in arguments.models.split(","):
        dtypes = arguments.dtypes.split(",")
        columns = []
        for dtype in dtypes:
            torch.manual_seed(0)
            columns.append(peaks(models()[name]().to(getattr(torch, dtype)).train(), arguments.drop))
        held = "let go of before backward" if arguments.drop else "held meanwhile"
        print(f"\n{name}, {BATCH} x {TOKENS} tokens, outputs {held}: peak in logits, and the loss\n")
        print("| | " + " | ".join(dtypes) + " |\n|---|" + "---:|" * len(dtypes))
        for way in LOSSES:
            cells = [f"{column[way][0]:.2f} ({column[way][1]:.4f})" for column in columns]
            print(f"| {way} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
