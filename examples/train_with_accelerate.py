"""Accelerate under bf16, with gradients accumulated over batches of unequal length.

Two traps. With mixed precision, Accelerate wraps the prepared model's forward: what it returns is copied to float32, so
that a loss outside reads a matrix of twice the size. Compute the loss inside the module that is prepared: there the
logits are bfloat16, and a scalar is all that is copied. (Unwrapping the model instead,
`accelerator.unwrap_model(model, keep_fp32_wrapper=False)`, takes autocast away too: `with accelerator.autocast():`
brings it back.)

And a mean of means is not the mean: divide by the number of labels in all accumulated batches, on all processes.
"""

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from softxent import fused_softmax_xent

VOCAB, ACCUMULATED = 100, 4


class LanguageModelWithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(VOCAB, 32), nn.Linear(32, 64), nn.ReLU())
        self.head = nn.Linear(64, VOCAB)
        self.logits_dtype: torch.dtype | None = None

    def forward(self, tokens: Tensor, labels: Tensor | None = None, normalizer: Tensor | None = None) -> Tensor:
        """Logits (B, T, V), or the loss of those of the labels (B, T) that are not -100."""
        logits: Tensor = self.head(self.body(tokens))
        self.logits_dtype = logits.dtype
        if labels is None:
            return logits
        return fused_softmax_xent(logits.flatten(0, 1), labels.flatten(), normalizer=normalizer, inplace=True)


def batches(n: int) -> list[tuple[Tensor, Tensor]]:
    """Tokens of which each follows from the one before, and the labels: some of them padding."""
    made = []
    for i in range(n):
        start = torch.randint(VOCAB, (8, 1))
        tokens = (start + 7 * torch.arange(17)) % VOCAB
        labels = tokens[:, 1:].clone()
        labels[:, 16 - 3 * (i % ACCUMULATED) :] = -100
        made.append((tokens[:, :-1], labels))
    return made


def main() -> tuple[float, float]:
    """The first loss and the last."""
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="bf16")
    model = LanguageModelWithLoss()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses = []
    for _ in range(15):
        group = [tuple(x.to(accelerator.device) for x in batch) for batch in batches(ACCUMULATED)]
        count = sum((labels != -100).sum() for _, labels in group)
        # Of all processes; their gradients are averaged, so that each divides by its share.
        normalizer = accelerator.gather(count).sum() / accelerator.num_processes
        loss = torch.zeros((), device=accelerator.device)
        for i, (tokens, labels) in enumerate(group):
            with accelerator.no_sync(model) if i < len(group) - 1 else nullcontext():
                part = model(tokens, labels, normalizer)
                accelerator.backward(part)
                loss += part.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert accelerator.unwrap_model(model).logits_dtype == torch.bfloat16  # inside
    assert model(tokens).dtype == torch.float32  # outside: a copy
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("loss from {:.3f} to {:.3f}".format(*main()))
