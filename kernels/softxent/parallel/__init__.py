"""Logits whose classes are spread over the ranks of a process group: shards.py, agreement.py, vocab.py, row_loss.py."""
