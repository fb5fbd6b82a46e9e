"""What torch.compile has to leave alone: it breaks its graph there, and `fullgraph=True` raises with the reason.

Imported once the compiler is at work: `torch.compiler.disable` imports all of it.
"""

import torch

from .functional import loss_alone as traced

REASON = "inplace=True does not go with torch.compile(fullgraph=True): leave it out there"

loss_alone = torch.compiler.disable(traced, reason=REASON)
