"""Log-probabilities and entropies in Hugging Face TRL: of a trainer, and as functions.

    use_fused_xent(trainer)         SFT, DPO, KTO, GRPO, RLOO: what their fused head computes; undo_fused_xent(trainer)
    selective_log_softmax, selective_log_softmax_and_entropy        TRL's functions of logits, with its arguments

Since 1.15 TRL gives a trainer's models a forward of its own (`add_fused_lm_head`), which runs the backbone and hands
hidden states, weight and labels to one function. Nothing that is done to logits or to a loss function reaches it. Here
the same forward runs with another function in that one's place, on one model, so that everything around stays TRL's:
the shift, sharded weights, the losses of routers.
"""

import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..functional import fused_softmax_xent_with_stats
from ..linear import fused_linear_softmax_xent_with_stats

OLDEST = (1, 15)
THEIRS = "_ChunkedLogProbFunction"  # in trl.trainer.utils, a torch.autograd.Function
OURS = {"log_probs": "target_logprob", "entropy": "entropy", "is_top1": "correct"}  # TRL's fields as stats
IGNORED = torch.iinfo(torch.int64).min


def use_fused_xent(
    trainer: Any, *, max_logits_bytes: int | None = None, accum_dtype: torch.dtype | None = None
) -> None:
    """Have a trainer's log-probabilities and entropies computed by `fused_linear_softmax_xent_with_stats`.

    Args:
        trainer: an SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer or RLOOTrainer that has not begun to train, or a
            model that TRL's `add_fused_lm_head` was applied to. A trainer's reference model is included.
        max_logits_bytes, accum_dtype: as there.

    Temperature, softcap and logit scale are those that TRL passes on. Log-probabilities and entropies are float32, from
    logits that are not rounded. Of DPO's metrics, `mean_logits` and `log_sum_sq_probs` are left to TRL's function,
    which then makes the logits once more, without a gradient. Called again, it replaces what it did before.
    `undo_fused_xent(trainer)` gives TRL's function back.

    Raises RuntimeError where this version of TRL, or the model, has no such head.
    """
    undo_fused_xent(trainer)
    models = [model for model in _models(trainer) if THEIRS in _names(model)]
    if not models:
        raise RuntimeError(
            f"{type(trainer).__name__} has no model with the fused head of trl {_version()}: "
            "call this when the trainer has been made, and before it trains"
        )
    for model in models:
        theirs = model.forward.__func__
        named = theirs.__globals__
        ours = _Function(named[THEIRS], {"max_logits_bytes": max_logits_bytes, "accum_dtype": accum_dtype})
        # Elsewhere than on a GPU TRL would hand over the rows without a label too.
        names = {**named, THEIRS: ours, "_use_triton": lambda device: True}
        forward = types.FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__, theirs.__closure__)
        forward.__kwdefaults__ = theirs.__kwdefaults__
        forward.__dict__.update(theirs.__dict__, softxent_theirs=theirs)  # __wrapped__, which has the signature
        model.forward = types.MethodType(forward, model)


def undo_fused_xent(trainer: Any) -> None:
    """Give the trainer's models TRL's own function again. Those that do not use the fused one stay as they are."""
    _check_version()
    for model in _models(trainer):
        theirs = getattr(vars(model).get("forward"), "softxent_theirs", None)
        if theirs is not None:
            model.forward = types.MethodType(theirs, model)


class _Function:
    """In the place of a torch.autograd.Function, with the arguments and results of its apply."""

    def __init__(self, theirs: Any, options: dict[str, Any]) -> None:
        self.theirs, self.options = theirs, options

    def apply(
        self,
        hidden: Tensor,  # [n_rows, n_features]
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,  # [n_rows]
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """z = cap * tanh(logit_scale * x / cap) / temperature, which is a softcap of cap / temperature."""
        if hasattr(weight, "ds_id"):
            raise RuntimeError(
                "DeepSpeed ZeRO 3 has the head's weight only in forward, and it is read again in backward: "
                "leave use_fused_xent out, or use another stage"
            )
        found = fused_linear_softmax_xent_with_stats(
            hidden,
            weight,
            targets,
            bias,
            reduction="none",
            stats=[stat for name, stat in OURS.items() if name in (*outputs, "log_probs")],
            softcap=None if final_logit_softcapping is None else final_logit_softcapping / temperature,
            logit_scale=logit_scale / temperature,
            **self.options,
        )
        log_sum_sq_probs = mean_logits = None
        if not set(outputs) <= set(OURS):
            with torch.no_grad():
                rest = tuple(name for name in outputs if name not in OURS)
                scaled = temperature, chunk_size, final_logit_softcapping, logit_scale, rest
                _, _, log_sum_sq_probs, mean_logits, _ = self.theirs.apply(hidden, weight, bias, targets, *scaled)
        return found.target_logprob, found.entropy, log_sum_sq_probs, mean_logits, found.correct


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """log softmax(logits / temperature) at `index`: TRL's function of this name.

    Args:
        logits: (..., C), floating point.
        index: (...), a class of each row, or (..., K), several.
        row_mask: in the shape of index. Where it is 0 the result is 0, has no gradient, and index may be anything.

    Returns float32, float64 for float64 logits, in the shape of index. TRL has it in the dtype of the logits on a CPU.
    """
    if index.dim() != logits.dim() or index.shape[:-1] != logits.shape[:-1]:
        one: Tensor = _selective(logits, index, temperature, row_mask, ("target_logprob",)).target_logprob
        return one
    index = _checked(index, temperature, row_mask)
    mask = torch.ones_like(index, dtype=torch.bool) if row_mask is None else row_mask != 0
    rows = (x.reshape(-1, x.shape[-1]) for x in (logits, index, mask))
    several: Tensor = _Several.apply(*rows, temperature, torch.is_grad_enabled() and logits.requires_grad)
    return several.view(index.shape)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_log_softmax` of one class a row, and the entropy of each row in nats, (...): TRL's function."""
    found = _selective(logits, index, temperature, row_mask, ("target_logprob", "entropy"))
    return found.target_logprob, found.entropy if entropy_requires_grad else found.entropy.detach()


def _selective(logits: Tensor, index: Tensor, temperature: float, mask: Tensor | None, stats: tuple[str, ...]) -> Any:
    if index.shape != logits.shape[:-1]:
        raise ValueError(f"index {tuple(index.shape)} does not fit logits {tuple(logits.shape)}: a class for each row")
    return _of_rows(logits, _checked(index, temperature, mask), temperature, mask, stats)


class _Several(torch.autograd.Function):
    """log p_k = (z_k - m) / temperature + log p_max, as exact where the model is confident as log p_max is.

    dlog p_k / dz_j = ([j == k] - p_j) / temperature, of which -p_j is what -lse gives: one matrix, added to in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # [n_rows, n_cols]
        ids: Tensor,  # [n_rows, K]
        mask: Tensor,  # [n_rows, K] bool
        temperature: float,
        differentiated: bool,
    ) -> Tensor:
        largest = logits.argmax(1, keepdim=True)
        with torch.set_grad_enabled(differentiated):
            z = logits.detach().requires_grad_(differentiated)
            stats = "target_logprob", "lse"
            found = _of_rows(z, largest[:, 0], temperature, mask.any(1), stats)
        ids = ids.masked_fill(~mask, 0)
        ctx.save_for_backward(ids, mask)
        ctx.z, ctx.lse, ctx.temperature = z, found.lse, temperature
        of_ids, m = (logits.gather(1, i).to(found.lse.dtype) for i in (ids, largest))
        logprobs: Tensor = (of_ids - m) / temperature + found.target_logprob.detach()[:, None]
        logprobs.masked_fill_(~mask, 0)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogprobs: Tensor) -> tuple[Tensor, None, None, None, None]:
        ids, mask = ctx.saved_tensors
        g = dlogprobs.masked_fill(~mask, 0)
        (dz,) = torch.autograd.grad(ctx.lse, ctx.z, -g.sum(1), retain_graph=True)
        rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
        # scatter_add_ takes a float32 copy of a matrix in half precision
        dz.index_put_((rows, ids), (g / ctx.temperature).to(dz.dtype), accumulate=True)
        return dz, None, None, None, None


def _of_rows(logits: Tensor, index: Tensor, temperature: float, mask: Tensor | None, stats: tuple[str, ...]) -> Any:
    """These stats in the shape of index, as a LossAndStats: 0 where mask is."""
    if mask is not None:
        index = index.masked_fill(mask == 0, IGNORED)
    found = fused_softmax_xent_with_stats(
        logits.reshape(-1, logits.shape[-1]),
        index.reshape(-1),
        ignore_index=IGNORED,
        reduction="none",
        stats=stats,
        logit_scale=1 / temperature,
    )
    return found._replace(**{name: getattr(found, name).view(index.shape) for name in stats})


def _checked(index: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    if not temperature > 0:
        raise ValueError("temperature must be positive")
    if mask is not None and mask.shape != index.shape:
        raise ValueError(f"row_mask {tuple(mask.shape)} must have the shape of index, {tuple(index.shape)}")
    return index.long()


def _models(trainer: Any) -> Iterator[Any]:
    """Those of a trainer that have a forward of their own, wherever they are wrapped."""
    roots = [trainer] if isinstance(trainer, nn.Module) else [trainer.model, getattr(trainer, "ref_model", None)]
    return (m for root in roots if root is not None for m in root.modules() if "forward" in vars(m))


def _names(model: Any) -> tuple[str, ...]:
    """What the code of its forward speaks of."""
    code: Any = getattr(model.forward, "__code__", None)  # a method has its function's
    return () if code is None else code.co_names


def _version() -> str:
    import trl

    return str(trl.__version__)


def _check_version() -> None:
    version = _version()
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        raise RuntimeError(f"trl {version} is not supported: install {'.'.join(map(str, OLDEST))} or newer")
