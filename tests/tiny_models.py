"""Models of Transformers of random weights, small enough for tests, and a tokenizer. Nothing is downloaded."""

from typing import Any

import torch

VOCAB = 101
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
DECODER = TEXT | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def made(name: str, config: str, **options: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**options)).train()


def tokenizer() -> Any:
    """Of VOCAB words: w3, w4, ... after <pad>, <s> and </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]
    of_words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    of_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=of_words, **names)


def texts(n: int) -> list[str]:
    """Of 5 to 5 + n words."""
    generator = torch.Generator().manual_seed(0)
    return [" ".join(f"w{i}" for i in torch.randint(3, VOCAB, (5 + k,), generator=generator)) for k in range(n)]
