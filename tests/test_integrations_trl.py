"""TRL beside its own log-probabilities and entropies, with tiny models of random weights: `make integrations`."""

import functools
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

trl = pytest.importorskip("trl", reason="trl is not installed: make integrations")

from datasets import Dataset  # noqa: E402
from trl.trainer import utils  # noqa: E402

import softxent.integrations.trl as ours  # noqa: E402
from memory import peak_bytes  # noqa: E402
from softxent import dispatch, fused_linear_softmax_xent_with_stats  # noqa: E402
from softxent.integrations.trl import (  # noqa: E402
    selective_log_softmax,
    selective_log_softmax_and_entropy,
    undo_fused_xent,
    use_fused_xent,
)
from tiny_models import DECODER, made, texts, tokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # the libraries' own

LOGPROB = ["target_logprob"]
ENTROPY, TOP1 = [*LOGPROB, "entropy"], [*LOGPROB, "entropy", "correct"]


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRET", False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the fused linear op is given: none, where TRL passes by."""
    found: list[dict[str, Any]] = []

    def counted(hidden: Tensor, *args: Any, **options: Any) -> Any:
        found.append({"rows": len(hidden)} | options)
        return fused_linear_softmax_xent_with_stats(hidden, *args, **options)

    monkeypatch.setattr(ours, "fused_linear_softmax_xent_with_stats", counted)
    return found


# Trainers.


def arguments(config: Any, folder: Path, **options: Any) -> Any:
    """One step of SGD, of which what it did to the parameters is the gradient."""
    return config(
        str(folder / "run"),
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=4,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **{"bf16": False} | options,
    )


def llama() -> Any:
    return made("LlamaForCausalLM", "LlamaConfig", **DECODER)


def gemma() -> Any:
    """Its hidden states are large and its cap is small, so that the cap tells."""
    return made("Gemma2ForCausalLM", "Gemma2Config", **DECODER, final_logit_softcapping=0.5)


def cohere() -> Any:
    return made("CohereForCausalLM", "CohereConfig", **DECODER, logit_scale=3.0)


def sft(folder: Path, model: Callable[[], Any] = llama, **options: Any) -> Any:
    args = arguments(trl.SFTConfig, folder, gradient_accumulation_steps=2, max_length=64, **options)
    data = Dataset.from_dict({"text": texts(8)})
    return trl.SFTTrainer(model(), args, train_dataset=data, processing_class=tokenizer())


def dpo(folder: Path) -> Any:
    data = Dataset.from_dict({"prompt": texts(4), "chosen": texts(5)[1:], "rejected": texts(6)[2:]})
    args = arguments(trl.DPOConfig, folder, use_weighting=True)
    return trl.DPOTrainer(llama(), llama(), args, train_dataset=data, processing_class=tokenizer())


def grpo(folder: Path, model: Callable[[], Any] = llama) -> Any:
    """With a reference model, which TRL loads from where the first came from."""
    for saved in (model(), tokenizer()):
        saved.save_pretrained(folder / "model")
    options = {"num_generations": 4, "max_completion_length": 6, "temperature": 0.8, "beta": 0.1, "seed": 3}

    def words(completions: list[str], **others: Any) -> list[float]:
        return [float(len(set(text.split())) + text.count("1")) for text in completions]

    data = Dataset.from_dict({"prompt": texts(4)})
    args = arguments(trl.GRPOConfig, folder, **options)
    return trl.GRPOTrainer(str(folder / "model"), words, args, train_dataset=data, processing_class=tokenizer())


def trained(trainer: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What the step logged, without times, and what it did."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    logged = {name: x for name, x in trainer.state.log_history[0].items() if "time" not in name}
    return logged, {name: p.detach() - before[name] for name, p in trainer.model.named_parameters()}


CASES: dict[str, tuple[Callable[[Path], Any], list[list[str]]]] = {
    "sft": (sft, [TOP1] * 2),
    "sft, softcap": (lambda folder: sft(folder, gemma), [TOP1] * 2),
    "sft, logit scale": (lambda folder: sft(folder, cohere), [TOP1] * 2),
    "sft, dft": (lambda folder: sft(folder, loss_type="dft"), [TOP1] * 2),
    "dpo": (dpo, [TOP1, LOGPROB]),  # of the reference last
    "grpo": (grpo, [LOGPROB, ENTROPY]),  # of the reference first
    "grpo, softcap": (lambda folder: grpo(folder, gemma), [LOGPROB, ENTROPY]),
}


@pytest.mark.parametrize("name", list(CASES))
def test_a_step_is_that_of_trl(name: str, tmp_path: Path, cpu: None, calls: list[dict[str, Any]]) -> None:
    trainer, stats = CASES[name]
    logged, moved = trained(trainer(tmp_path))
    assert not calls and max(x.abs().max() for x in moved.values()) > 1e-4
    fused = trainer(tmp_path)
    use_fused_xent(fused)
    found, step = trained(fused)
    assert [call["stats"] for call in calls] == stats
    assert found == pytest.approx(logged, rel=1e-5, abs=1e-6)
    worst = max((step[key] - x).abs().max().item() for key, x in moved.items())
    print(f"{name}: {len(calls)} calls, loss {found['loss']:.7f}, gradient apart by {worst:.1e}")
    assert step.keys() == moved.keys() and worst <= 1e-6


def test_under_mixed_precision_too(tmp_path: Path, cpu: None, calls: list[dict[str, Any]]) -> None:
    logged, moved = trained(sft(tmp_path, bf16=True))
    fused = sft(tmp_path, bf16=True)
    use_fused_xent(fused)
    found, step = trained(fused)
    assert len(calls) == 2 and found["loss"] == pytest.approx(logged["loss"], abs=1e-3)
    for name, x in moved.items():
        torch.testing.assert_close(step[name], x, rtol=0, atol=1e-2 * x.abs().max().item())


def test_one_trainer_is_changed_and_can_be_given_back(tmp_path: Path, cpu: None, calls: list[dict[str, Any]]) -> None:
    trainer, other = sft(tmp_path), sft(tmp_path)
    model, ids = trainer.model, torch.arange(12).view(2, 6)
    theirs, signature = model.forward, inspect.signature(model.forward)
    expected = model(ids, labels=ids, fused_lm_head=True)
    use_fused_xent(trainer, max_logits_bytes=8192, accum_dtype=torch.float32)
    found = model(ids, labels=ids, fused_lm_head=True)
    assert found.keys() == expected.keys() and inspect.signature(model.forward) == signature
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-6)
    assert (calls[0]["max_logits_bytes"], calls[0]["accum_dtype"]) == (8192, torch.float32)
    use_fused_xent(trainer)  # instead
    model(ids, labels=ids, fused_lm_head=True)
    assert calls[1]["max_logits_bytes"] is None
    assert model(ids).logits.shape == (2, 6, 101)  # as ever
    other.model(ids, labels=ids, fused_lm_head=True)
    undo_fused_xent(trainer)
    model(ids, labels=ids, fused_lm_head=True)
    assert len(calls) == 2 and model.forward == theirs
    undo_fused_xent(trainer)
    assert model.forward == theirs


def test_rows_without_a_label_are_not_multiplied(cpu: None, calls: list[dict[str, Any]]) -> None:
    model, ids = llama(), torch.arange(12).view(2, 6)
    utils.add_fused_lm_head(model)
    use_fused_xent(model)  # a model, too
    labels = ids.masked_fill(ids < 4, -100)
    outputs = model(ids, labels=labels, fused_lm_head=True)
    assert calls[0]["rows"] == outputs.label_mask.sum() == 7 and torch.equal(outputs.log_probs != 0, outputs.label_mask)
    none = model(ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    none.loss.backward()
    assert none.loss == 0 and not model.lm_head.weight.grad.any()


def test_adapters_of_peft(tmp_path: Path, cpu: None, calls: list[dict[str, Any]]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: make integrations")

    def trainer() -> Any:
        adapter = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        args = arguments(trl.SFTConfig, tmp_path, max_length=64)
        data = Dataset.from_dict({"text": texts(4)})
        torch.manual_seed(0)
        return trl.SFTTrainer(llama(), args, train_dataset=data, processing_class=tokenizer(), peft_config=adapter)

    logged, moved = trained(trainer())
    fused = trainer()
    use_fused_xent(fused)
    found, step = trained(fused)
    assert len(calls) == 1 and found == pytest.approx(logged, rel=1e-5, abs=1e-6)
    for name, x in moved.items():
        torch.testing.assert_close(step[name], x, rtol=0, atol=1e-6)


def test_what_cannot_be_served_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = trl.__version__
    with pytest.raises(RuntimeError, match=f"LlamaForCausalLM has no model with the fused head of trl {version}"):
        use_fused_xent(llama())
    model = llama()
    utils.add_fused_lm_head(model)
    use_fused_xent(model)
    model.lm_head.weight.ds_id = 1  # as DeepSpeed marks what it spreads
    with pytest.raises(RuntimeError, match="DeepSpeed ZeRO 3"):
        model(torch.ones(1, 3, dtype=torch.int64), labels=torch.ones(1, 3, dtype=torch.int64), fused_lm_head=True)
    monkeypatch.setattr(trl, "__version__", "1.14.2")
    with pytest.raises(RuntimeError, match=r"trl 1\.14\.2 is not supported: install 1\.15 or newer"):
        use_fused_xent(model)


def test_the_library_is_imported_when_it_is_used() -> None:
    code = "import sys, softxent.integrations.trl; sys.exit('trl' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": "kernels"})


def test_peak_of_a_step(cpu: None) -> None:
    """4 x 256 tokens, 32000 classes: what the head of a tiny Llama holds at most, TRL's and ours."""
    model = made("LlamaForCausalLM", "LlamaConfig", **DECODER | {"vocab_size": 32000})
    ids = torch.randint(32000, (4, 256), generator=torch.Generator().manual_seed(1))
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))

    def step() -> None:
        model(ids, labels=ids, fused_lm_head=True).loss.backward()

    step()  # the gradients are there
    theirs = peak_bytes(step)
    use_fused_xent(model)
    found = peak_bytes(step)
    print(f"peak of a step from hidden states: TRL {theirs / 2**20:.1f} MiB, fused {found / 2**20:.1f} MiB")
    assert found <= 1.1 * (32 << 20) < theirs


# Functions of logits.

ROWS, CLASSES, SEVERAL = (2, 5), 33, 3


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    logits = 3 * torch.randn(*ROWS, CLASSES, generator=torch.Generator().manual_seed(1))
    logits[0, 0, 7] = 60  # sure of itself
    return logits.to(dtype).requires_grad_()


def index_of(several: bool) -> Tensor:
    index = torch.randint(CLASSES, (*ROWS, SEVERAL) if several else ROWS, generator=torch.Generator().manual_seed(2))
    index[0, 0] = 7
    return index


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_a_single_row_is_a_row(several: bool, cpu: None) -> None:
    logits, index = rows(), index_of(several)
    found = selective_log_softmax(logits[0, 1], index[0, 1])
    torch.testing.assert_close(found, selective_log_softmax(logits, index)[0, 1])
    assert found.shape == index[0, 1].shape


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_without_gradients_they_are_the_same(several: bool, without: Any, cpu: None) -> None:
    logits, index = rows(), index_of(several)
    expected = selective_log_softmax(logits, index)
    with without():
        found = selective_log_softmax(logits, index)
        assert not found.requires_grad and torch.equal(found, expected)


def naive(logits: Tensor, index: Tensor, temperature: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """In float64."""
    log_p = (logits.double() / temperature).log_softmax(-1)
    found = log_p.gather(-1, index if index.dim() == 3 else index[..., None]).view(index.shape)
    entropy = -(log_p.exp() * log_p).sum(-1)
    if mask is not None:
        found = found.masked_fill(mask == 0, 0)
        entropy = entropy.masked_fill(mask == 0, 0) if mask.dim() == 2 else entropy
    return found, entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_log_probabilities_are_exact(several: bool, masked: bool, dtype: torch.dtype, path: str) -> None:
    logits, index = rows(dtype), index_of(several)
    mask = (torch.arange(index.numel()) % 4 > 0).view(index.shape).int() if masked else None
    expected, entropy = naive(logits, index, 0.8, mask)
    given = index if mask is None else index.masked_fill(mask == 0, -100)  # which nobody reads
    found = selective_log_softmax(logits, given, 0.8, mask)
    outputs, right = [found], [expected]
    if not several:
        again, of_rows = selective_log_softmax_and_entropy(logits, given, True, 0.8, mask)
        torch.testing.assert_close(again, found, rtol=1e-6, atol=0)
        outputs, right = [found, of_rows], [expected, entropy]
        assert not selective_log_softmax_and_entropy(logits, given, False, 0.8, mask)[1].requires_grad
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(3)
    incoming = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in right]
    of_found = torch.autograd.grad(outputs, logits, [g.to(wide) for g in incoming])[0]
    of_right = torch.autograd.grad(right, logits, incoming)[0]
    for x, exact in zip(outputs, right, strict=True):
        assert x.dtype == wide
        torch.testing.assert_close(x, exact.to(wide), rtol=2e-6, atol=1e-12)
    rounding = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(of_found, of_right, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_they_are_those_of_trl(several: bool, cpu: None) -> None:
    logits, index = rows(), index_of(several)
    mask = (torch.arange(index.numel()) % 4 > 0).view(index.shape)
    for options in ({}, {"temperature": 0.7}, {"row_mask": mask}):
        of_trl = utils.selective_log_softmax(logits, index, **options)
        torch.testing.assert_close(selective_log_softmax(logits, index, **options), of_trl, rtol=1e-5, atol=1e-5)
        if not several:
            pairs = [
                function(logits, index, **options)
                for function in (selective_log_softmax_and_entropy, utils.selective_log_softmax_and_entropy)
            ]
            torch.testing.assert_close(*pairs, rtol=1e-5, atol=1e-5)


def test_a_row_that_is_masked_may_hold_anything(cpu: None) -> None:
    for several in (False, True):
        logits, index = rows().detach(), index_of(several)
        logits[1, 2] = float("nan")
        mask = torch.ones(index.shape)
        mask[1, 2] = 0
        logits.requires_grad_()
        found = selective_log_softmax(logits, index, row_mask=mask)
        assert not found[1, 2].any() and found.isfinite().all()
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        assert gradient.isfinite().all() and not gradient[1, 2].any()


def test_bad_input_is_one_error() -> None:
    logits, index = rows(), index_of(False)
    for function in (selective_log_softmax, selective_log_softmax_and_entropy):
        with pytest.raises(ValueError, match="temperature must be positive"):
            function(logits, index, temperature=0.0)
        with pytest.raises(ValueError, match=r"index \(2, 4\) does not fit logits \(2, 5, 33\)"):
            function(logits, index[:, 1:])
        with pytest.raises(ValueError, match=r"row_mask \(2, 4\) must have the shape of index, \(2, 5\)"):
            function(logits, index, row_mask=index[:, 1:])
    with pytest.raises(ValueError, match=r"index \(2, 5, 3\) does not fit"):
        selective_log_softmax_and_entropy(logits, index_of(True))


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_peak_in_logits(several: bool, cpu: None) -> None:
    """A step's, of 4 x 256 x 16000 in bfloat16, beside TRL's."""
    logits = torch.randn(4, 256, 16000, dtype=torch.bfloat16, requires_grad=True)
    index = torch.randint(16000, (4, 256, SEVERAL) if several else (4, 256))

    def step(function: Callable[..., Tensor]) -> None:
        torch.autograd.grad(function(logits, index, temperature=0.8).sum(), logits)

    size = logits.numel() * logits.itemsize
    functions = utils.selective_log_softmax, selective_log_softmax
    theirs, found = (peak_bytes(functools.partial(step, function)) / size for function in functions)
    print(f"peak of {'several' if several else 'one'} a row, bfloat16: TRL {theirs:.2f} logits, fused {found:.2f}")
    assert found < 1.5 < theirs  # 12 MB of it are beside pieces of any width


def test_the_head_of_another_dtype_is_an_error(cpu: None) -> None:
    model = llama().to(torch.bfloat16)
    utils.add_fused_lm_head(model, cast_lm_head_to_fp32=True)  # whose weight the trainer would cast
    use_fused_xent(model)
    with pytest.raises(RuntimeError, match="linear_weight must have the dtype of input"):
        model(torch.ones(1, 3, dtype=torch.int64), labels=torch.ones(1, 3, dtype=torch.int64), fused_lm_head=True)
    model.lm_head = nn.Linear(16, 101, bias=False)
    ids = torch.arange(6)[None]
    outputs = model(ids, labels=ids, fused_lm_head=True)
    hidden = model.model(ids).last_hidden_state[:, :-1]
    right = -F.cross_entropy(model.lm_head(hidden.float())[0], ids[0, 1:], reduction="none")
    torch.testing.assert_close(outputs.log_probs[0], right)
