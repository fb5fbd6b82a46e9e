"""The loss in Hugging Face Transformers: of one model, and for its Trainer.

    use_fused_xent(model)                            model(..., labels=labels).loss is fused; undo_fused_xent(model)
    Trainer(compute_loss_func=trainer_loss(model, args))    what the Trainer calls with the model's outputs
    causal_lm_loss, masked_lm_loss, ...              the functions themselves, with Transformers' arguments

A model computes its loss by `self.loss_function`, which every instance may have its own of: nothing else changes, no
other model, and neither torch nor Transformers. The logits arrive as the model returns them, after its softcap or
scale. They are read as they lie: labels are padded and shifted instead, and nothing is copied to float32.

Some models compute their loss inside forward, out of reach (T5, BERT's classifiers): trainer_loss serves these.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import fused_softmax_xent

OLDEST = 5  # major version


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    inplace: bool = False,
    **unused: Any,
) -> Tensor:
    """Mean cross-entropy of each token given those before it: Transformers' ForCausalLMLoss.

    Args:
        logits: (..., T, V), floating point.
        labels: (..., T), int64, the tokens themselves: logits at t are compared with the label at t + 1, and the last
            with none.
        vocab_size: not used: V is that of the logits.
        num_items_in_batch: what the sum is divided by instead of the number of labels that count: a number, a tensor
            of one, or the vector of equal numbers that the Trainer makes for DataParallel.
        ignore_index: labels that do not count.
        shift_labels: (..., T), the label of each position, in the place of `labels`.
        label_smoothing, inplace: as for `fused_softmax_xent`.
        unused: what else a model passes on, as Transformers' own losses take it.

    Returns the loss in float32, float64 for float64 logits. Errors are those of `fused_softmax_xent`.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("causal_lm_loss needs labels, or shift_labels")
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return _mean(logits, shift_labels, num_items_in_batch, ignore_index, label_smoothing, inplace)


def masked_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: int = -100,
    *,
    label_smoothing: float = 0.0,
    inplace: bool = False,
    **unused: Any,
) -> Tensor:
    """As `causal_lm_loss` with labels (..., T) of the same positions as the logits: Transformers' ForMaskedLMLoss."""
    return _mean(logits, labels, num_items_in_batch, ignore_index, label_smoothing, inplace)


def token_classification_loss(
    logits: Tensor,
    labels: Tensor,
    config: Any = None,
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: int = -100,
    *,
    label_smoothing: float = 0.0,
    inplace: bool = False,
    **unused: Any,
) -> Tensor:
    """As `masked_lm_loss`, of (..., T, num_labels) logits: Transformers' ForTokenClassification."""
    return _mean(logits, labels, num_items_in_batch, ignore_index, label_smoothing, inplace)


def sequence_classification_loss(
    labels: Tensor,
    pooled_logits: Tensor,
    config: Any,
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: int = -100,
    *,
    label_smoothing: float = 0.0,
    inplace: bool = False,
    **unused: Any,
) -> Tensor:
    """Transformers' ForSequenceClassificationLoss, which images, audio and video have too.

    labels: (N). pooled_logits: (N, num_labels). config: the model's; its problem_type, where None, is set as
    Transformers sets it. Regression and multi-label problems have another loss than cross-entropy: Transformers' own.
    """
    problem = config.problem_type
    if problem is None and config.num_labels > 1 and labels.dtype in (torch.int64, torch.int32):
        problem = config.problem_type = "single_label_classification"
    if problem != "single_label_classification":
        from transformers.loss.loss_utils import ForSequenceClassificationLoss

        loss: Tensor = ForSequenceClassificationLoss(labels, pooled_logits, config)
        return loss
    return _mean(pooled_logits, labels, num_items_in_batch, ignore_index, label_smoothing, inplace)


FUSED: dict[str, Callable[..., Tensor]] = {  # in the place of transformers.loss.loss_utils.<name>
    "ForCausalLMLoss": causal_lm_loss,
    "ForMaskedLMLoss": masked_lm_loss,
    "ForSequenceClassificationLoss": sequence_classification_loss,
    "ForTokenClassification": token_classification_loss,
}


def use_fused_xent(model: nn.Module, *, inplace: bool = False) -> None:
    """Have `model(..., labels=labels)` compute its loss by the fused operation; `undo_fused_xent(model)` takes it back.

    Args:
        model: a model of Transformers, or one wrapped by PEFT, DistributedDataParallel or torch.compile. For causal
            and masked language models, and classification of sequences, images, audio, video and tokens.
        inplace: write the gradient over the logits, which saves a matrix of their size. What forward returns has then
            no logits (None) whenever it has a loss to differentiate; without gradients, in evaluation, it has both.
            With torch.compile it saves nothing: Dynamo keeps the logits among the outputs.

    Called again, it replaces what it did before. The Trainer takes the loss from elsewhere if its
    label_smoothing_factor or compute_loss_func is set: use `trainer_loss` then.

    Raises RuntimeError, naming the model's class and the version of Transformers, where that version is not supported,
    the model has no such hook, or a loss that is not a cross-entropy of its logits, or one of its user's.
    """
    undo_fused_xent(model)
    target = _pretrained(model)
    if not _has_hook(target):
        raise RuntimeError(
            f"{_named(target)} computes its loss inside forward, without loss_function, which is out of reach: "
            "pass Trainer(compute_loss_func=trainer_loss(model, args)), or compute the loss from its logits"
        )
    fused = FUSED[_name_of(target.loss_function, target)]
    target.loss_function = partial(fused, inplace=inplace)
    if inplace:
        target.register_forward_hook(_without_logits)


def undo_fused_xent(model: nn.Module) -> None:
    """Give the model Transformers' own loss again. One that does not use the fused loss stays as it is."""
    from transformers.loss import loss_utils

    target = _pretrained(model)
    if _is_fused(target.loss_function):
        target.loss_function = getattr(loss_utils, _name_of(target.loss_function, target))
    for key in [key for key, hook in target._forward_hooks.items() if hook is _without_logits]:
        del target._forward_hooks[key]


def trainer_loss(model: nn.Module, args: Any, *, inplace: bool = False) -> Callable[..., Tensor]:
    """A function for `Trainer(model, args, compute_loss_func=trainer_loss(model, args))`.

    Args:
        model: of those that `use_fused_xent` takes, with or without the hook. Encoder-decoder models compare logits
            and labels of one position; other language models shift the labels.
        args: the Trainer's TrainingArguments. Beside a compute_loss_func the Trainer ignores their
            label_smoothing_factor: it is taken here instead.
        inplace: write the gradient over the logits; `outputs.logits` is then None.

    The function takes (outputs, labels, num_items_in_batch=None) and divides by num_items_in_batch, the number of
    labels in all accumulated batches, or by that of its own labels where it is None, as in evaluation.

    Raises RuntimeError as `use_fused_xent`, and for a decoder that computes its loss inside forward, where nothing says
    whether the labels are to be shifted.
    """
    target = _pretrained(model)
    name = _name_of(target.loss_function, target)
    if name == "ForCausalLMLoss":
        if target.config.is_encoder_decoder:
            name = "ForMaskedLMLoss"
        elif not _has_hook(target):
            raise RuntimeError(
                f"{_named(target)} computes its loss inside forward, and nothing says whether it shifts the labels: "
                "pass a function of your own that calls causal_lm_loss or masked_lm_loss"
            )
    fused = partial(FUSED[name], label_smoothing=args.label_smoothing_factor, inplace=inplace)
    return partial(_of_outputs, fused, target.config)


def _of_outputs(
    fused: partial[Tensor],
    config: Any,
    outputs: Any,  # a ModelOutput, or a tuple
    labels: Tensor | None,
    num_items_in_batch: float | Tensor | None = None,
) -> Tensor:
    if labels is None:
        raise ValueError("no labels to compute a loss from: the Trainer takes them from the batch's 'labels'")
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    loss = fused(
        logits=logits, pooled_logits=logits, labels=labels, config=config, num_items_in_batch=num_items_in_batch
    )
    if fused.keywords["inplace"] and loss.requires_grad and isinstance(outputs, OrderedDict):
        _forget_logits(outputs)
    return loss


def _mean(
    logits: Tensor,
    labels: Tensor,
    num_items_in_batch: float | Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    inplace: bool,
) -> Tensor:
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.reshape(-1)[0]
    return fused_softmax_xent(
        logits.reshape(-1, logits.shape[-1]),
        labels.to(logits.device).reshape(-1),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        normalizer=num_items_in_batch,
        loss_dtype=torch.promote_types(logits.dtype, torch.float32),
        # compiled, what is written over is for the compiler to choose
        inplace=inplace and not torch.compiler.is_compiling(),
    )


def _without_logits(model: nn.Module, args: Any, outputs: Any) -> Any:
    """A forward hook: the outputs without the logits that the loss's gradient was written over."""
    if isinstance(outputs, tuple):
        loss, logits, *rest = (*outputs, None)
        written = _written_over(loss, logits)
        return (loss, None, *rest[:-1]) if written else outputs
    if _written_over(outputs.loss, outputs.logits):
        _forget_logits(outputs)
    return outputs


def _forget_logits(outputs: Any) -> None:
    OrderedDict.__delitem__(outputs, "logits")  # ModelOutput's own refuses
    outputs.logits = None


def _written_over(loss: Any, logits: Any) -> bool:
    """A tuple's first two may be logits and something else: a loss is a scalar."""
    return all(isinstance(x, Tensor) and x.requires_grad for x in (loss, logits)) and loss.dim() == 0


def _is_fused(function: Any) -> bool:
    return isinstance(function, partial) and function.func in FUSED.values()


def _pretrained(model: nn.Module) -> Any:
    """The outermost model of Transformers in a module, which may be it, or wrap it."""
    import transformers

    if int(transformers.__version__.split(".")[0]) < OLDEST:
        raise RuntimeError(f"transformers {transformers.__version__} is not supported: install {OLDEST}.0 or newer")
    found = next((m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)), None)
    if found is None:
        raise RuntimeError(
            f"{type(model).__name__} is not a model of transformers {transformers.__version__}, nor holds one"
        )
    return found


def _has_hook(model: nn.Module) -> bool:
    """Whether forward, or the one that it hands on to by super(), calls self.loss_function."""
    for owner in type(model).__mro__:
        if "forward" in vars(owner):
            names = inspect.unwrap(vars(owner)["forward"]).__code__.co_names
            if "loss_function" in names:
                return True
            if "super" not in names:
                return False
    return False


def _name_of(loss: Any, model: nn.Module) -> str:
    """The name in `FUSED` of a model's loss, which is Transformers' or in its place."""
    from transformers.loss import loss_utils

    for name, fused in FUSED.items():
        if loss is getattr(loss_utils, name) or (_is_fused(loss) and loss.func is fused):
            return name
    raise RuntimeError(f"{_named(model)}: no fused loss can take the place of its {getattr(loss, '__name__', loss)}")


def _named(model: nn.Module) -> str:
    import transformers

    return f"{type(model).__name__} of transformers {transformers.__version__}"
