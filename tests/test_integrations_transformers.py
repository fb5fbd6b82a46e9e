"""Transformers beside its own loss, with tiny models of random weights: `make integrations`. Nothing is downloaded."""

import copy
import inspect
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed: make integrations")

from transformers.loss.loss_utils import ForCausalLMLoss  # noqa: E402

from memory import peak_bytes  # noqa: E402
from softxent import dispatch, fused_linear_softmax_xent  # noqa: E402
from softxent.integrations import linear_logits  # noqa: E402
from softxent.integrations.transformers import (  # noqa: E402
    causal_lm_loss,
    masked_lm_loss,
    trainer_loss,
    undo_fused_xent,
    use_fused_xent,
)
from tiny_models import DECODER, TEXT, VOCAB, made  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # the libraries' own

BATCH, TOKENS = 2, 7
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BERT = TEXT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODERN = TEXT | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
BART = {"vocab_size": VOCAB, "d_model": 16, "dropout": 0.0, "decoder_start_token_id": 2}
BART |= {
    f"{part}_{name}": n
    for part in ("encoder", "decoder")
    for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
}
T5 = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
FIVE = {"num_labels": 5, "classifier_dropout": 0.0}
VIT = TEXT | {"image_size": 8, "patch_size": 4, "num_labels": 10}


def bart() -> Any:
    """With a bias of its own beside the head, which begins as zeros."""
    model = made("BartForConditionalGeneration", "BartConfig", **BART)
    model.final_logits_bias.copy_(torch.linspace(-1, 1, VOCAB))
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: made("LlamaForCausalLM", "LlamaConfig", **DECODER),
    "gemma2": lambda: made("Gemma2ForCausalLM", "Gemma2Config", **DECODER, final_logit_softcapping=0.05),
    "cohere": lambda: made("CohereForCausalLM", "CohereConfig", **DECODER, logit_scale=3.0),
    "granite": lambda: made("GraniteForCausalLM", "GraniteConfig", **DECODER, logits_scaling=0.25),
    "gpt2": lambda: made("GPT2LMHeadModel", "GPT2Config", vocab_size=50257, **GPT2),
    "llama, sequence": lambda: made("LlamaForSequenceClassification", "LlamaConfig", **DECODER, num_labels=5),
    "llama, tokens": lambda: made("LlamaForTokenClassification", "LlamaConfig", **DECODER, **FIVE),
    "modernbert, masked": lambda: made("ModernBertForMaskedLM", "ModernBertConfig", **MODERN),
    "bert, masked": lambda: made("BertForMaskedLM", "BertConfig", **BERT),
    "bert, sequence": lambda: made("BertForSequenceClassification", "BertConfig", **BERT, num_labels=5),
    "bart": bart,
    "t5": lambda: made("T5ForConditionalGeneration", "T5Config", **T5, decoder_start_token_id=0),
    "vit": lambda: made("ViTForImageClassification", "ViTConfig", **VIT),
}
WITHIN_FORWARD = ("bert, masked", "bert, sequence", "bart", "t5")  # no hook: only trainer_loss serves them


def inputs_of(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        pixels = torch.randn(BATCH, 3, 8, 8, generator=generator)
        return {"pixel_values": pixels, "labels": torch.tensor([3, 9])}
    ids = torch.randint(3, VOCAB, (BATCH, TOKENS), generator=generator)
    if name.endswith("sequence"):
        return {"input_ids": ids, "labels": torch.tensor([4, 0])}
    labels = ids % 5 if name.endswith("tokens") else ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(model: Any, loss: Callable[[Any], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    value = loss(model)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    assert found[1].keys() == expected[1].keys() and any(g.abs().max() > 1e-4 for g in expected[1].values())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-6, msg=name)


class OnTheFirstGPU(Tensor):
    device = torch.device("cuda:0")

    def to(self, *to: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(5)


@pytest.mark.parametrize("linear", [False, True], ids=["", "linear"])
def test_the_count_of_the_trainer_comes_to_where_the_logits_are(linear: bool) -> None:
    """Of a model that is spread over GPUs, the last of which has the head."""
    model, inputs = MODELS["llama"](), inputs_of("llama")
    use_fused_xent(model, linear=linear)
    expected = model(**inputs, num_items_in_batch=torch.tensor(5)).loss
    assert torch.equal(model(**inputs, num_items_in_batch=torch.tensor(3).as_subclass(OnTheFirstGPU)).loss, expected)


class OnTheHost(Tensor):
    def to(self, *to: Any, **how: Any) -> Tensor:  # type: ignore[override]
        assert not isinstance(to[0], torch.device), "of pageable memory: the host would wait for the GPU"
        return super().to(*to, **how)


@pytest.mark.parametrize("linear", [False, True], ids=["", "linear"])
def test_a_count_on_the_host_is_read_there(linear: bool) -> None:
    model, inputs = MODELS["llama"](), inputs_of("llama")
    use_fused_xent(model, linear=linear)
    expected = model(**inputs, num_items_in_batch=5).loss
    assert torch.equal(model(**inputs, num_items_in_batch=torch.tensor(5).as_subclass(OnTheHost)).loss, expected)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRET", False)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in WITHIN_FORWARD])
def test_loss_and_gradients_are_those_of_the_stock_loss(name: str, inplace: bool, path: str) -> None:
    model, inputs = MODELS[name](), inputs_of(name)
    if name in ("llama", "modernbert, masked", "vit"):  # the generic classifiers of Transformers do not pass it on
        inputs["num_items_in_batch"] = torch.tensor(5)
    calls = 0

    def loss(model: Any) -> Tensor:
        nonlocal calls
        outputs = model(**inputs)
        calls += outputs.logits is None
        value: Tensor = outputs.loss
        return value

    expected = loss_and_gradients(model, loss)
    use_fused_xent(model, inplace=inplace)
    assert_same(loss_and_gradients(model, loss), expected)
    assert calls == inplace


@pytest.mark.parametrize("name", list(MODELS))
def test_the_trainers_function_gives_the_loss_of_the_model_itself(name: str, cpu: None) -> None:
    model, inputs = MODELS[name](), inputs_of(name)
    without = {key: x for key, x in inputs.items() if key != "labels"}
    if model.config.is_encoder_decoder:
        without["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
    function = trainer_loss(model, transformers.TrainingArguments("unused", use_cpu=True))
    expected = loss_and_gradients(model, lambda model: model(**inputs).loss)
    assert_same(loss_and_gradients(model, lambda model: function(model(**without), inputs["labels"])), expected)


@pytest.mark.parametrize(
    "n_labels, labels", [(1, [[0.5], [1.0]]), (3, [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), (3, [2, 0])], ids=str
)
def test_the_problem_type_is_found_as_transformers_finds_it(n_labels: int, labels: list[Any], cpu: None) -> None:
    """Regression and several labels a row keep their loss."""
    inputs = inputs_of("vit") | {"labels": torch.tensor(labels)}
    stock, ours = (made("ViTForImageClassification", "ViTConfig", **VIT | {"num_labels": n_labels}) for _ in range(2))
    use_fused_xent(ours)
    assert_same(*(loss_and_gradients(model, lambda model: model(**inputs).loss) for model in (ours, stock)))
    assert ours.config.problem_type == stock.config.problem_type


def test_in_place_the_logits_are_never_a_gradient(cpu: None) -> None:
    model, inputs = MODELS["llama"](), inputs_of("llama")
    logits = model(**inputs).logits
    use_fused_xent(model, inplace=True)
    outputs = model(**inputs)
    assert outputs.logits is None and "logits" not in outputs and outputs.loss.requires_grad
    assert model(**inputs, return_dict=False)[1] is None
    with torch.no_grad():
        outputs = model(**inputs)
        assert torch.equal(outputs.logits, logits) and outputs.loss is not None
    assert torch.equal(model(inputs["input_ids"]).logits, logits)
    function = trainer_loss(model, transformers.TrainingArguments("unused", use_cpu=True), inplace=True)
    outputs = model(inputs["input_ids"])
    function(outputs, inputs["labels"]).backward()
    assert outputs.logits is None and "logits" not in outputs


def test_one_model_is_changed_and_can_be_given_back(cpu: None) -> None:
    model, other, inputs = MODELS["llama"](), MODELS["llama"](), inputs_of("llama")
    stock = model.loss_function
    use_fused_xent(model, inplace=True)
    assert other.loss_function is stock
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied(**inputs).logits is None
        undo_fused_xent(copied)
        assert copied.loss_function is stock and copied(**inputs).logits is not None
    use_fused_xent(model)  # instead
    assert model(**inputs).logits is not None and model.loss_function is not stock
    undo_fused_xent(model)
    assert model.loss_function is stock
    undo_fused_xent(model)
    assert model.loss_function is stock


def test_wrapped_models_are_found(cpu: None) -> None:
    model = MODELS["llama"]()
    use_fused_xent(nn.DataParallel(model), inplace=True)
    assert model(**inputs_of("llama")).logits is None


def test_compiled_in_place_too(cpu: None) -> None:
    model, inputs = MODELS["llama"](), inputs_of("llama")
    expected = loss_and_gradients(model, lambda model: model(**inputs).loss)
    use_fused_xent(model, inplace=True)
    compiled = torch.compile(model, fullgraph=True)
    assert compiled(**inputs).logits is None
    assert_same(loss_and_gradients(model, lambda model: compiled(**inputs).loss), expected)


@pytest.mark.parametrize("form", [6, 6.0, torch.tensor(6), torch.tensor([6, 6]), torch.full((2, 1), 6.0)], ids=str)
def test_the_number_of_items_comes_in_every_form(form: Any, cpu: None) -> None:
    logits, labels = torch.randn(BATCH, TOKENS, VOCAB), inputs_of("llama")["labels"]
    expected = ForCausalLMLoss(logits, labels, VOCAB, form).mean()  # the Trainer takes the mean of a vector
    found = causal_lm_loss(logits, labels, VOCAB, form)
    assert found.dim() == 0
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_shifted_labels_are_taken_as_they_are(cpu: None) -> None:
    logits, labels = torch.randn(BATCH, TOKENS, VOCAB), inputs_of("llama")["labels"]
    stock = ForCausalLMLoss(logits, None, VOCAB, shift_labels=labels)
    found = causal_lm_loss(logits, None, VOCAB, shift_labels=labels)
    torch.testing.assert_close(found, stock, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, masked_lm_loss(logits, labels), rtol=0, atol=0)
    with pytest.raises(ValueError, match="needs labels, or shift_labels"):
        causal_lm_loss(logits, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_loss_is_not_rounded_to_half_precision(dtype: torch.dtype, cpu: None) -> None:
    logits, labels = torch.randn(BATCH, TOKENS, VOCAB).to(dtype), inputs_of("llama")["labels"]
    loss = causal_lm_loss(logits, labels)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    expected = ForCausalLMLoss(logits, labels, VOCAB)
    torch.testing.assert_close(loss.float(), expected, rtol=1e-6, atol=0)


def test_what_cannot_be_served_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    version = transformers.__version__
    for name in WITHIN_FORWARD:
        model = MODELS[name]()
        with pytest.raises(RuntimeError, match=f"{type(model).__name__} of transformers {version} computes its loss"):
            use_fused_xent(model)
    asked = made("LlamaForQuestionAnswering", "LlamaConfig", **DECODER)
    for function in (use_fused_xent, lambda model: trainer_loss(model, None)):
        with pytest.raises(RuntimeError, match=f"LlamaForQuestionAnswering of transformers {version}: no fused loss"):
            function(asked)
    model = MODELS["llama"]()
    model.loss_function = sum
    with pytest.raises(RuntimeError, match="no fused loss can take the place of its sum"):
        use_fused_xent(model)
    assert model.loss_function is sum
    shifts = made("XLNetLMHeadModel", "XLNetConfig", vocab_size=VOCAB, d_model=16, n_layer=1, n_head=2, d_inner=16)
    with pytest.raises(RuntimeError, match=r"XLNetLMHeadModel .* nothing says whether it shifts"):
        trainer_loss(shifts, None)
    with pytest.raises(RuntimeError, match=f"Linear is not a model of transformers {version}"):
        use_fused_xent(nn.Linear(2, 2))
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.6")  # the lazy one
    with pytest.raises(RuntimeError, match=r"transformers 4\.57\.6 is not supported: install 5.0"):
        use_fused_xent(MODELS["llama"]())


def test_the_library_is_imported_when_it_is_used() -> None:
    code = "import sys, softxent.integrations.transformers; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": "kernels"})


# From hidden states.


def calls_from_hidden_states(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the fused linear op is given from here on."""
    calls: list[dict[str, Any]] = []

    def counted(hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append({"hidden": hidden} | options)
        return fused_linear_softmax_xent(hidden, *args, **options)

    monkeypatch.setattr(linear_logits, "fused_linear_softmax_xent", counted)
    return calls


@pytest.mark.parametrize("name", list(MODELS))
def test_from_hidden_states_loss_and_gradients_are_the_same(
    name: str, cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classifiers too, though their logits are few."""
    model, inputs = MODELS[name](), inputs_of(name)
    outputs: list[Any] = []

    def loss(model: Any) -> Tensor:
        outputs[:] = [model(**inputs)]
        value: Tensor = outputs[0].loss
        return value

    expected = loss_and_gradients(model, loss)
    logits = outputs[0].logits
    use_fused_xent(model, linear=True)
    calls = calls_from_hidden_states(monkeypatch)
    found = loss_and_gradients(model, loss)
    assert_same(found, expected)
    worst = max((found[1][key] - g).abs().max().item() for key, g in expected[1].items())
    print(f"{name}, linear: loss apart by {found[0] - expected[0]:.1e}, gradients by {worst:.1e}")
    assert len(calls) == 1 and calls[0]["hidden"].shape[-1] == 16
    assert outputs[0].logits is None and "logits" not in outputs[0]
    as_tuple = model(**inputs, return_dict=False)
    assert torch.equal(as_tuple[0], found[0]) and as_tuple[1] is None

    calls.clear()
    with torch.no_grad():
        loss(model)
    torch.testing.assert_close(outputs[0].logits, logits)
    torch.testing.assert_close(outputs[0].loss, expected[0])
    inputs.pop("labels")
    if not model.config.is_encoder_decoder:
        assert torch.equal(model(**inputs).logits, logits)
    assert not calls


def test_the_head_is_itself_outside_of_a_step_and_again_when_it_is_undone(cpu: None) -> None:
    model, other, inputs = MODELS["gpt2"](), MODELS["gpt2"](), inputs_of("gpt2")
    stock = model.loss_function
    use_fused_xent(model, linear=True)
    hidden = torch.randn(2, 16, requires_grad=True)
    between = [None] * (list(inspect.signature(model.forward).parameters).index("labels") - 1)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied(**inputs).logits is None and copied(input_ids=inputs["input_ids"]).logits is not None
        assert copied(inputs["input_ids"], *between, inputs["labels"]).logits is None  # by position
        assert torch.equal(copied.lm_head(hidden), other.lm_head(hidden))
        undo_fused_xent(copied)
        assert copied.loss_function is stock and copied(**inputs).logits is not None
        for module in (copied, copied.lm_head):
            assert not module._forward_hooks and not module._forward_pre_hooks
    use_fused_xent(model, linear=True)
    use_fused_xent(model)  # instead
    assert model(**inputs).logits is not None and model.loss_function is not stock
    function = trainer_loss(model, transformers.TrainingArguments("unused", use_cpu=True), linear=True)
    outputs = model(inputs["input_ids"])
    function(outputs, inputs["labels"]).backward()
    assert outputs.logits is None and "logits" not in outputs
    model.eval()
    assert model(inputs["input_ids"]).logits is not None and model(**inputs).logits is None


def test_compiled_the_hidden_states_are_one_graph(cpu: None) -> None:
    model, inputs = MODELS["gemma2"](), inputs_of("gemma2")
    expected = loss_and_gradients(model, lambda model: model(**inputs).loss)
    use_fused_xent(model, linear=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert compiled(**inputs).logits is None
    assert_same(loss_and_gradients(model, lambda model: compiled(**inputs).loss), expected)
    inputs.pop("labels")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


def test_recomputed_activations_change_nothing(cpu: None) -> None:
    model, inputs = MODELS["llama"](), inputs_of("llama")
    expected = loss_and_gradients(model, lambda model: model(**inputs).loss)
    use_fused_xent(model, linear=True)
    model.gradient_checkpointing_enable()
    assert_same(loss_and_gradients(model, lambda model: model(**inputs).loss), expected)


def test_under_autocast_the_loss_is_that_of_logits_which_are_not_rounded(cpu: None) -> None:
    model, inputs = MODELS["llama"](), inputs_of("llama")
    hidden: list[Tensor] = []
    model.model.register_forward_hook(lambda module, args, outputs: hidden.append(outputs.last_hidden_state))
    use_fused_xent(model, linear=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**inputs)
    outputs.loss.backward()
    logits = hidden[0].double() @ model.lm_head.weight.double().T
    exact = ForCausalLMLoss(logits, inputs["labels"], VOCAB)
    torch.testing.assert_close(outputs.loss, exact, rtol=1e-6, atol=0)
    assert outputs.logits is None and model.lm_head.weight.grad.dtype == torch.float32


def test_the_options_of_chunks_are_those_of_the_op(cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = MODELS["llama"](), inputs_of("llama")
    calls = calls_from_hidden_states(monkeypatch)
    use_fused_xent(model, linear=True, max_logits_bytes=8192, accum_dtype=torch.float32)
    model(**inputs)
    assert (calls[0]["max_logits_bytes"], calls[0]["accum_dtype"]) == (8192, torch.float32)


@pytest.mark.parametrize("frozen", [False, True])
def test_adapters_elsewhere_than_on_the_head(frozen: bool, cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: make integrations")
    model, inputs = MODELS["llama"](), inputs_of("llama")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=None, init_lora_weights=False)
    if not frozen:  # before it is wrapped, and after
        use_fused_xent(model, linear=True)
    wrapped = peft.get_peft_model(model, config)
    expected_of = copy.deepcopy(wrapped)
    undo_fused_xent(expected_of)
    if frozen:
        use_fused_xent(wrapped, linear=True)
    else:
        for each in (wrapped, expected_of):
            each.base_model.model.lm_head.weight.requires_grad_()
    calls = calls_from_hidden_states(monkeypatch)
    found = loss_and_gradients(wrapped, lambda model: model(**inputs).loss)
    assert len(calls) == 1
    assert_same(found, loss_and_gradients(expected_of, lambda model: model(**inputs).loss))
    assert ("base_model.model.lm_head.weight" in found[1]) is not frozen


def test_a_head_that_is_more_than_its_weight_is_refused(cpu: None) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: make integrations")
    model, inputs = MODELS["llama"](), inputs_of("llama")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"])
    use_fused_xent(model, linear=True)
    wrapped = peft.get_peft_model(model, config)
    words = f"LlamaForCausalLM of transformers {transformers.__version__}: the linear layer is peft.*Merge adapters"
    with pytest.raises(RuntimeError, match=words):
        wrapped(**inputs)
    with pytest.raises(RuntimeError, match=words):
        use_fused_xent(wrapped, linear=True)
    use_fused_xent(wrapped)  # from logits it is served
    assert wrapped(**inputs).logits is not None


def test_a_head_that_fsdp_shards_by_itself_is_refused(cpu: None) -> None:
    model, inputs = MODELS["llama"](), inputs_of("llama")
    use_fused_xent(model, linear=True)
    model.lm_head.unshard = lambda: None  # what fully_shard gives it
    for function in (lambda: model(**inputs), lambda: use_fused_xent(model, linear=True)):
        with pytest.raises(RuntimeError, match=r"LlamaForCausalLM .*: fully_shard was applied to its head alone"):
            function()


def test_a_head_that_deepspeed_has_only_while_it_is_called_is_refused(cpu: None) -> None:
    model, inputs = MODELS["llama"](), inputs_of("llama")
    use_fused_xent(model, linear=True)
    model.lm_head.weight.ds_id = 1  # as ZeRO 3 marks what it spreads
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM .*: DeepSpeed ZeRO 3"):
        model(**inputs)
    model.eval()
    with torch.no_grad():
        assert model(**inputs).logits is not None
    use_fused_xent(model)
    model.train()(**inputs).loss.backward()


def test_a_head_that_was_replaced_is_asked_for_again(cpu: None) -> None:
    model, inputs = MODELS["llama"](), inputs_of("llama")
    use_fused_xent(model, linear=True)
    model.lm_head = nn.Linear(16, VOCAB)
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM .* has another head than before: call use_fused_xent"):
        model(**inputs)
    use_fused_xent(model, linear=True)
    assert model(**inputs).logits is None


def test_a_model_that_does_something_else_to_its_logits_is_refused_by_name(cpu: None) -> None:
    class Masking(transformers.LlamaForCausalLM):  # type: ignore[name-defined,misc]
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            logits = self.lm_head(self.model(input_ids).last_hidden_state)
            logits[..., 0] = -1e4
            return {"loss": self.loss_function(logits, labels), "logits": logits}

    model, inputs = Masking(transformers.LlamaConfig(**DECODER)), inputs_of("llama")
    use_fused_xent(model, linear=True)
    with pytest.raises(RuntimeError, match=r"Masking of transformers .*: it asks its logits for an assignment"):
        model(**inputs)
    assert isinstance(model.lm_head(torch.randn(2, 16)), Tensor)  # the refusal left nothing behind
    with torch.no_grad():
        assert model(**inputs)["logits"] is not None


def test_what_linear_cannot_serve_is_refused_by_name() -> None:
    version = transformers.__version__
    with pytest.raises(RuntimeError, match=f"LlamaModel of transformers {version} has no output layer"):
        use_fused_xent(made("LlamaModel", "LlamaConfig", **DECODER), linear=True)
    model = MODELS["llama"]()
    with pytest.raises(ValueError, match="inplace=True writes over the logits, of which linear=True makes none"):
        use_fused_xent(model, linear=True, inplace=True)
    with pytest.raises(ValueError, match="max_logits_bytes and accum_dtype go with linear=True"):
        use_fused_xent(model, max_logits_bytes=1 << 20)
    asked = made("LlamaForQuestionAnswering", "LlamaConfig", **DECODER)
    for refused in (model, asked):
        assert not refused._forward_hooks and not refused._forward_pre_hooks
    asked.classifier = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=f"LlamaForQuestionAnswering of transformers {version} takes no labels"):
        use_fused_xent(asked, linear=True)


def test_the_page_about_training_runs(tmp_path: Path, cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="trl is not installed: make integrations")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    blocks = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 4 and names["logprobs"].shape == (2, 16) and names["several"].shape == (2, 16, 5)
    assert names["trainer"].compute_loss_func is not None and names["model"](names["tokens"][:, :4]).logits is not None


# The Trainer.


class Rows(torch.utils.data.Dataset[Any]):
    def __init__(self, name: str, n: int) -> None:
        self.rows = [{k: x[0] for k, x in inputs_of(name).items()} for _ in range(n)]
        generator = torch.Generator().manual_seed(2)
        for i, row in enumerate(self.rows):
            ids = torch.randint(3, VOCAB, (TOKENS,), generator=generator)
            labels = ids.clone()
            labels[: i % 5] = -100  # as many labels as no other batch has
            row |= {"input_ids": ids, "labels": labels}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.rows[i]


def trained(
    tmp_path: Path, steps: int, how: str, smoothing: float = 0.0, option: str = "", bf16: bool = False
) -> tuple[float, dict[str, Tensor]]:
    """The loss that the Trainer logs of one step of SGD, and what the step did, which is the gradient."""
    model = MODELS["llama"]()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = transformers.TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=16 // steps,
        gradient_accumulation_steps=steps,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        label_smoothing_factor=smoothing,
        bf16=bf16,
    )
    function = None
    options: dict[str, Any] = {option: True} if option else {}
    if how == "model":
        use_fused_xent(model, **options)
    elif how == "function":
        function = trainer_loss(model, args, **options)
    trainer = transformers.Trainer(model, args, train_dataset=Rows("llama", 16), compute_loss_func=function)
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return float(loss), {name: before[name] - p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("option", ["", "inplace", "linear"])
@pytest.mark.parametrize("how", ["model", "function"])
def test_accumulated_steps_are_one_batch(
    how: str, option: str, tmp_path: Path, cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, gradients = trained(tmp_path, 1, "stock")
    assert max(g.abs().max() for g in gradients.values()) > 1e-3
    calls = calls_from_hidden_states(monkeypatch)
    for steps in (1, 4, 16):
        calls.clear()
        found, moved = trained(tmp_path, steps, how, option=option)
        assert found == pytest.approx(loss, abs=1e-6)
        worst = max((moved[name] - gradients[name]).abs().max().item() for name in gradients)
        print(f"accumulated {steps:2d}: {how} {option}, loss {found:.7f}, gradient apart by {worst:.1e}")
        assert worst <= 1e-6
        assert len(calls) == (steps if option == "linear" else 0)


@pytest.mark.parametrize("option", ["", "linear"])
@pytest.mark.parametrize("steps", [1, 4])
def test_label_smoothing_is_the_trainers(steps: int, option: str, tmp_path: Path, cpu: None) -> None:
    loss, gradients = trained(tmp_path, steps, "stock", smoothing=0.3)
    found, moved = trained(tmp_path, steps, "function", smoothing=0.3, option=option)
    assert found == pytest.approx(loss, abs=1e-6)
    for name in gradients:
        torch.testing.assert_close(moved[name], gradients[name], rtol=0, atol=1e-6)
    assert trained(tmp_path, steps, "function", option=option)[0] != pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("how", ["model", "function"])
def test_mixed_precision_goes_by_hidden_states_too(
    how: str, tmp_path: Path, cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate converts what the model returns, and here is nothing to convert."""
    loss, gradients = trained(tmp_path, 4, "stock", bf16=True)
    calls = calls_from_hidden_states(monkeypatch)
    found, moved = trained(tmp_path, 4, how, option="linear", bf16=True)
    assert len(calls) == 4 and found == pytest.approx(loss, abs=1e-3)
    for name in gradients:
        torch.testing.assert_close(moved[name], gradients[name], rtol=0, atol=1e-2 * gradients[name].abs().max().item())


def test_evaluation_has_its_loss_and_logits(tmp_path: Path, cpu: None) -> None:
    def metrics(found: Any) -> dict[str, float]:
        return {"width": float(found.predictions.shape[-1])}

    results = []
    ways = [(how, option) for how in ("model", "function") for option in ("inplace", "linear")]
    for how, option in [("stock", "inplace"), *ways]:
        options: dict[str, Any] = {option: True}
        model = MODELS["llama"]()
        args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
        if how == "model":
            use_fused_xent(model, **options)
        function = trainer_loss(model, args, **options) if how == "function" else None
        trainer = transformers.Trainer(
            model, args, eval_dataset=Rows("llama", 4), compute_metrics=metrics, compute_loss_func=function
        )
        results.append(trainer.evaluate())
    for found in results[1:]:
        assert found["eval_width"] == VOCAB and found["eval_loss"] == pytest.approx(results[0]["eval_loss"], abs=1e-6)


def test_a_batch_without_labels_is_an_error(cpu: None) -> None:
    model = MODELS["llama"]()
    function = trainer_loss(model, transformers.TrainingArguments("unused", use_cpu=True))
    with pytest.raises(ValueError, match="no labels to compute a loss from"):
        function(model(inputs_of("llama")["input_ids"]), None)


# Memory.

CHUNK = 32 << 20  # what the linear op may allocate for one, where the weight is smaller


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("how", ["stock", "fused", "in place", "linear"])
def test_peak_of_a_step_in_logits(how: str, dtype: torch.dtype, cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny Llama, 4 x 256 tokens, 32000 classes: what one step holds at most above what it began with."""
    model = made("LlamaForCausalLM", "LlamaConfig", **DECODER | {"vocab_size": 32000}).to(dtype)
    ids = torch.randint(32000, (4, 256), generator=torch.Generator().manual_seed(1))
    if how != "stock":
        use_fused_xent(model, inplace=how == "in place", linear=how == "linear")

    def step() -> None:
        outputs = model(ids, labels=ids)  # held meanwhile, as a training loop does
        outputs.loss.backward()

    step()  # the gradients are there
    logits = ids.numel() * 32000 * dtype.itemsize
    peak = peak_bytes(step)
    print(f"peak of a step, {how}, {str(dtype)[6:]}: {peak / logits:.3f} logits, {peak / 2**20:.1f} MiB")
    limit = {"fused": 2.2 * logits, "in place": 1.2 * logits, "linear": 1.1 * CHUNK}
    assert peak <= limit[how] if how in limit else peak > 4 * logits
