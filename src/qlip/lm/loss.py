"""The next token's cross-entropy without all of its logits."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100
ONE_CHUNK = 2**24  # logits, 64 MiB


def chunked_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, chunk_size: int | None = None) -> Tensor:
    """Sum of −ln p(target) over the tokens, their logits computed `chunk_size` tokens at a time.

    Of several chunks each has its logits computed again in the backward pass: for one more product with the head,
    no more than chunk_size · vocab_size exist at once. Value and gradients are those of `F.cross_entropy` over
    all. It is a sum, so that those over several vocabularies, parts of a batch or ranks add up before they are
    divided.

    Args:
        hidden: (..., D) hidden states, each of the token before its target; float16, bfloat16 or more.
        head: (V, D) weights of the head, or of the part of the vocabulary that the softmax is over.
        targets: (...) int64 in [0, V); −100 does not count.
        chunk_size: tokens at a time; by default 1,024, and of a small vocabulary as many as have 2²⁴ logits.

    Returns:
        (), in float32 at least.
    """
    states, labels = hidden.flatten(0, -2), targets.flatten()
    if len(states) <= (chunk_size := chunk_size or max(1024, ONE_CHUNK // len(head))):
        return _cross_entropy(states, head, labels)
    total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    for part, wanted in zip(states.split(chunk_size), labels.split(chunk_size), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(_cross_entropy, part, head, wanted, use_reentrant=False)
        else:
            total = total + _cross_entropy(part, head, wanted)
    return total


def _cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, head)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum")
