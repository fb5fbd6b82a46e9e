"""Hugging Face's `kernels` beside a checkout whose source folder has that name: `make integrations`."""

import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INSTALLED = {found.metadata["Name"] for found in distributions()} >= {"kernels", "transformers"}
pytestmark = pytest.mark.skipif(not INSTALLED, reason="kernels and transformers are not installed: make integrations")

USED = """
import kernels, torch
assert callable(kernels.get_kernel) and kernels.__file__, kernels
print(kernels.__file__)
import softxent
print(softxent.__file__)
logits = torch.randn(4, 10, requires_grad=True)
softxent.fused_softmax_xent(logits, torch.arange(4)).backward()
import transformers
tiny = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=20)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny))
ids = torch.arange(8)[None]
from softxent.integrations.transformers import use_fused_xent
use_fused_xent(model)
model(ids, labels=ids).loss.backward()
"""


@pytest.mark.parametrize("path", ["kernels", "kernels:."])
def test_both_are_imported_from_the_root_of_the_checkout(path: str) -> None:
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", USED]  # which looks in the working folder first
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    theirs, ours = done.stdout.split()
    assert Path(ours) == ROOT / "kernels" / "softxent" / "__init__.py"
    assert ROOT / "kernels" not in Path(theirs).parents
    assert Path(theirs).parts[-2:] == ("kernels", "__init__.py")
