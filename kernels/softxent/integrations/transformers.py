"""The loss in Hugging Face Transformers: of one model, and for its Trainer.

    use_fused_xent(model)                            model(..., labels=labels).loss is fused; undo_fused_xent(model)
    use_fused_xent(model, linear=True)               the same from hidden states, without the logits
    Trainer(compute_loss_func=trainer_loss(model, args))    what the Trainer calls with the model's outputs
    causal_lm_loss, masked_lm_loss, ...              the functions themselves, with Transformers' arguments

A model computes its loss by `self.loss_function`, which every instance may have its own of: nothing else changes, no
other model, and neither torch nor Transformers. The logits arrive as the model returns them, after its softcap or
scale. They are read as they lie: labels are padded and shifted instead, and nothing is copied to float32.

Some models compute their loss inside forward, out of that reach (T5, BERT's classifiers): trainer_loss serves these,
and linear=True, where the head hands on `LinearLogits`, of which any cross-entropy is the fused one. The model's own
forward runs on: what it does to its logits need not be known by its name.
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
from ..linear import check_head
from .linear_logits import HeadInput, LinearLogits

OLDEST = 5  # major version


def masked_lm_loss(
    logits: Tensor | LinearLogits,
    labels: Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: int = -100,
    *,
    label_smoothing: float = 0.0,
    inplace: bool = False,
    **unused: Any,
) -> Tensor:
    """Mean cross-entropy of each token: Transformers' ForMaskedLMLoss.

    Args:
        logits: (..., T, V), floating point.
        labels: (..., T), int64, of the same positions.
        vocab_size: not used: V is that of the logits.
        num_items_in_batch: what the sum is divided by instead of the number of labels that count: a number, a tensor
            of one, or the vector of equal numbers that the Trainer makes for DataParallel.
        ignore_index: labels that do not count.
        label_smoothing, inplace: as for `fused_softmax_xent`.
        unused: what else a model passes on, as Transformers' own losses take it.

    Returns the loss in float32, float64 for float64 logits. Errors are those of `fused_softmax_xent`.
    """
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.reshape(-1)[0]
        if num_items_in_batch.device.type != "cpu":  # where it is read without waiting for a GPU, as a copy would
            num_items_in_batch = num_items_in_batch.to(logits.device)  # the Trainer's is on the first
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "normalizer": num_items_in_batch}
    rows, target = logits.reshape(-1, logits.shape[-1]), labels.to(logits.device).reshape(-1)
    if isinstance(rows, LinearLogits):
        return rows.loss(target, ignore_index=ignore_index, **options)
    return fused_softmax_xent(
        rows,
        target,
        ignore_index=ignore_index,
        loss_dtype=torch.promote_types(logits.dtype, torch.float32),
        # compiled, what is written over is for the compiler to choose
        inplace=inplace and not torch.compiler.is_compiling(),
        **options,
    )


def causal_lm_loss(
    logits: Tensor | LinearLogits,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """As `masked_lm_loss`, of each token given those before it: Transformers' ForCausalLMLoss.

    Args:
        labels: (..., T), int64, the tokens themselves: logits at t are compared with the label at t + 1, and the last
            with none.
        shift_labels: (..., T), the label of each position, in the place of `labels`.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("causal_lm_loss needs labels, or shift_labels")
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return masked_lm_loss(logits, shift_labels, vocab_size, num_items_in_batch, ignore_index, **options)


def token_classification_loss(
    logits: Tensor | LinearLogits, labels: Tensor, config: Any = None, **options: Any
) -> Tensor:
    """As `masked_lm_loss`, of (..., T, num_labels) logits: Transformers' ForTokenClassification."""
    return masked_lm_loss(logits, labels, **options)


def sequence_classification_loss(
    labels: Tensor, pooled_logits: Tensor | LinearLogits, config: Any, logits: Any = None, **options: Any
) -> Tensor:
    """As `masked_lm_loss`: Transformers' ForSequenceClassificationLoss, which images, audio and video have too.

    labels: (N). pooled_logits: (N, num_labels). logits: not used. config: the model's; its problem_type, where None, is
    set as Transformers sets it. Regression and multi-label problems have another loss than cross-entropy:
    Transformers' own.
    """
    problem = config.problem_type
    if problem is None and config.num_labels > 1 and labels.dtype in (torch.int64, torch.int32):
        problem = config.problem_type = "single_label_classification"
    if problem != "single_label_classification":
        from transformers.loss.loss_utils import ForSequenceClassificationLoss

        loss: Tensor = ForSequenceClassificationLoss(labels, pooled_logits, config)
        return loss
    return masked_lm_loss(pooled_logits, labels, **options)


FUSED: dict[str, Callable[..., Tensor]] = {  # in the place of transformers.loss.loss_utils.<name>
    "ForCausalLMLoss": causal_lm_loss,
    "ForMaskedLMLoss": masked_lm_loss,
    "ForSequenceClassificationLoss": sequence_classification_loss,
    "ForTokenClassification": token_classification_loss,
}


def use_fused_xent(
    model: nn.Module,
    *,
    inplace: bool = False,
    linear: bool = False,
    max_logits_bytes: int | None = None,
    accum_dtype: torch.dtype | None = None,
) -> None:
    """Have `model(..., labels=labels)` compute its loss by the fused operation; `undo_fused_xent(model)` takes it back.

    Args:
        model: a model of Transformers, or one wrapped by PEFT, DistributedDataParallel or torch.compile. For causal
            and masked language models, and classification of sequences, images, audio, video and tokens.
        inplace: write the gradient over the logits, which saves a matrix of their size. What forward returns has then
            no logits (None) whenever it has a loss to differentiate; without gradients, in evaluation, it has both.
            With torch.compile it saves nothing: Dynamo keeps the logits among the outputs.
        linear: from the hidden states, by `fused_linear_softmax_xent`: where forward is given labels, and there is a
            gradient to compute, its head makes no logits, and it returns none (None). Otherwise the logits are as
            ever. For models that compute their loss inside forward too, such as T5. The model's own softcap, scale and
            bias are followed; a step that cannot be is refused there, by name.
        max_logits_bytes, accum_dtype: with `linear`, as for `fused_linear_softmax_xent`.

    Called again, it replaces what it did before. The Trainer takes the loss from elsewhere if its
    label_smoothing_factor or compute_loss_func is set: use `trainer_loss` then.

    Raises RuntimeError, naming the model's class and the version of Transformers, where that version is not supported,
    the model has no such hook, or a loss that is not a cross-entropy of its logits, or one of its user's; with
    `linear`, where it has no head, or one that is not a plain linear layer, such as one with LoRA: also in forward, if
    it has become so since.
    """
    target = _pretrained(model)
    undo_fused_xent(model)
    if not linear and (max_logits_bytes, accum_dtype) != (None, None):
        raise ValueError("max_logits_bytes and accum_dtype go with linear=True")
    if linear:
        _use_linear(target, inplace, False, {"max_logits_bytes": max_logits_bytes, "accum_dtype": accum_dtype})
    elif not _has_hook(target):
        raise RuntimeError(
            f"{_named(target)} computes its loss inside forward, without loss_function, which is out of reach: "
            "pass Trainer(compute_loss_func=trainer_loss(model, args)), or linear=True here"
        )
    if _has_hook(target):
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
    for module in target.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "func", hook) in HOOKS]:
                del hooks[key]


def trainer_loss(
    model: nn.Module,
    args: Any,
    *,
    inplace: bool = False,
    linear: bool = False,
    max_logits_bytes: int | None = None,
    accum_dtype: torch.dtype | None = None,
) -> Callable[..., Tensor]:
    """A function for `Trainer(model, args, compute_loss_func=trainer_loss(model, args))`.

    Args:
        model: of those that `use_fused_xent` takes, with or without the hook. Encoder-decoder models compare logits
            and labels of one position; other language models shift the labels.
        args: the Trainer's TrainingArguments. Beside a compute_loss_func the Trainer ignores their
            label_smoothing_factor: it is taken here instead.
        inplace: write the gradient over the logits; `outputs.logits` is then None.
        linear, max_logits_bytes, accum_dtype: as for `use_fused_xent`, to which it amounts; in training the model then
            returns no logits for others to read, with labels or without.

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
    if linear:
        undo_fused_xent(model)
        _use_linear(target, inplace, True, {"max_logits_bytes": max_logits_bytes, "accum_dtype": accum_dtype})
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
    used_up = isinstance(logits, LinearLogits) or (fused.keywords["inplace"] and loss.requires_grad)
    if used_up and isinstance(outputs, OrderedDict):
        _forget(outputs, "logits")
    return loss


def _without_logits(model: nn.Module, args: Any, outputs: Any) -> Any:
    """A forward hook: the outputs without the logits that the loss's gradient was written over."""
    if isinstance(outputs, tuple):
        loss, logits, *rest = (*outputs, None)
        written = _written_over(loss, logits)
        return (loss, None, *rest[:-1]) if written else outputs
    if _written_over(outputs.loss, outputs.logits):
        _forget(outputs, "logits")
    return outputs


def _forget(outputs: Any, name: str) -> None:
    OrderedDict.__delitem__(outputs, name)  # ModelOutput's own refuses
    setattr(outputs, name, None)


# From hidden states: the model says when, its head hands on, and the model's outputs are rid of what it handed on.


def _use_linear(model: Any, inplace: bool, always: bool, options: dict[str, Any]) -> None:
    if inplace:
        raise ValueError("inplace=True writes over the logits, of which linear=True makes none: choose one")
    head = _plain_head(model)
    names = list(inspect.signature(type(model).forward).parameters)
    if "labels" not in names:
        raise RuntimeError(f"{_named(model)} takes no labels, and computes no loss")
    model.register_forward_pre_hook(partial(_before, names.index("labels") - 1, always), with_kwargs=True)
    model.register_forward_hook(_after, always_call=True)
    head.register_forward_pre_hook(partial(_hand_on, _named(model), options))
    head.makes_no_logits = False


def _before(position: int, always: bool, model: Any, args: Any, kwargs: Any) -> None:
    head = _head(model)
    if "makes_no_logits" not in vars(head) or hasattr(head, "unshard"):
        _plain_head(model)
        raise RuntimeError(f"{_named(model)} has another head than before: call use_fused_xent(model, ...) again")
    labels = args[position] if len(args) > position else kwargs.get("labels")
    head.makes_no_logits = labels is not None or (always and model.training)


def _hand_on(owner: str, options: dict[str, Any], head: Any, args: Any) -> Any:
    (hidden,) = args
    if head.makes_no_logits and torch.is_grad_enabled() and (hidden.requires_grad or head.weight.requires_grad):
        if hasattr(head.weight, "ds_id"):
            raise RuntimeError(
                f"{owner}: DeepSpeed ZeRO 3 has the head's weight only while the head is called, and the loss reads it "
                "later: leave linear=True out, or use another stage"
            )
        return (HeadInput(hidden, owner, options),)
    return args


def _after(model: Any, args: Any, outputs: Any) -> Any:
    """The outputs without what the head handed on, unless it is for `trainer_loss`: there is no loss then."""
    _head(model).makes_no_logits = False
    if isinstance(outputs, tuple):
        if isinstance(outputs[0], LinearLogits):
            return outputs
        return tuple(None if isinstance(x, LinearLogits) else x for x in outputs)
    if getattr(outputs, "loss", None) is not None:
        for name in [name for name, x in outputs.items() if isinstance(x, LinearLogits)]:
            _forget(outputs, name)
    return outputs


def _head(model: Any) -> Any:
    """The layer that makes the logits: of a language model, or a classifier."""
    found = model.get_output_embeddings()
    return next((x for x in (found, *(getattr(model, name, None) for name in ("classifier", "score"))) if x), None)


def _plain_head(model: Any) -> Any:
    head = _head(model)
    if head is None:
        raise RuntimeError(f"{_named(model)} has no output layer to take the weight of: leave linear=True out")
    if hasattr(head, "unshard"):  # FSDP2's
        raise RuntimeError(
            f"{_named(model)}: fully_shard was applied to its head alone, whose weight is gone when the loss wants it: "
            "let fully_shard(model) take it with the rest"
        )
    try:
        check_head(head, called=True)
    except RuntimeError as error:
        raise RuntimeError(f"{_named(model)}: {error}") from None
    return head


HOOKS = (_without_logits, _before, _after, _hand_on)


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
