"""TRL's SFTTrainer, its loss from the hidden states by softxent: a tiny model of random weights, nothing is downloaded.

TRL computes log-probabilities and entropies within a forward of its own, which passes by a model's loss function, and
builds all logits again for a `compute_loss_func`. `use_fused_xent(trainer)` goes where that forward computes them: one
line, after the trainer is made and before it trains; DPO, KTO, GRPO and RLOO take the same.
"""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from softxent.integrations.trl import use_fused_xent

VOCAB = 100


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", *(str(i) for i in range(VOCAB - 3))]
    of_words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="0"))
    of_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=of_words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def texts(n: int) -> list[str]:
    """Numbers, of which each follows from the one before."""
    starts = torch.randint(VOCAB - 3, (n,)).tolist()
    return [" ".join(str((start + 7 * t) % (VOCAB - 3)) for t in range(16)) for start in starts]


def main() -> tuple[float, float]:
    """The first loss and the last."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    args = SFTConfig(
        "runs/trl",
        max_steps=30,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    data = Dataset.from_dict({"text": texts(512)})
    trainer = SFTTrainer(LlamaForCausalLM(config), args, train_dataset=data, processing_class=tokenizer())
    use_fused_xent(trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("loss from {:.3f} to {:.3f}".format(*main()))
