"""What chunked cross-entropy, the cache and our transformer cost: `python benchmarks/lm.py`.

Writes results/lm-DEVICE.json. Weights and tokens are random. What is compared takes turns, and a ratio is the
median over the turns, so that whatever else the machine does disturbs both alike.

- `loss`: forward and backward of a head and its cross-entropy, chunked against plain: time, and the most bytes of
  tensors at a time besides the inputs, gradients among them.
- `decoding`: greedy tokens with the cache, against a whole forward for each token, and against `generate` of
  transformers with the same weights; the tokens must be the same.
- `mask`: a training step over packed documents, masked, against plain causal attention.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro

from qlip.environment import environment, resolve_device
from qlip.figures.memory import Counter
from qlip.files import whole_file
from qlip.lm.checkpoint import save
from qlip.lm.config import LMConfig
from qlip.lm.generate import generate
from qlip.lm.loss import chunked_cross_entropy
from qlip.lm.transformer import Transformer, document_mask

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        device: where.
        width, layers: of the transformer.
        vocab_size: of the transformer, and of the loss.
        loss_tokens, chunk_size: of a step's loss, and how many of them go at a time.
        batch_size: rows that are decoded.
        prompt, new: tokens before and after.
        turns: how often each pair is timed.
    """

    device: str = "auto"
    width: int = 256
    layers: int = 6
    vocab_size: int = 16384
    loss_tokens: int = 4096
    chunk_size: int = 512
    batch_size: int = 4
    prompt: int = 32
    new: int = 96
    turns: int = 5


def build(options: Options) -> Transformer:
    """A Llama with two queries to a head of keys."""
    torch.manual_seed(0)
    config = LMConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 32,
        num_key_value_heads=options.width // 64,
        max_position_embeddings=2048,
    )
    return Transformer(config).to(resolve_device(options.device)).eval()


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], turns: int) -> dict[str, float]:
    """Median seconds of either, and the median of the turns' ratios, ours to theirs."""
    pairs = []
    for turn in range(turns + 1):
        pair = [_timed(ours), _timed(theirs)]
        if turn:  # the first allocates
            pairs.append(pair)
    ours_s, theirs_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {"ours_s": ours_s, "theirs_s": theirs_s, "ratio": statistics.median(a / b for a, b in pairs)}


def measure_loss(options: Options) -> dict[str, float]:
    """Forward and backward of a head and its cross-entropy, chunked against plain."""
    device = resolve_device(options.device)
    torch.manual_seed(0)
    hidden = torch.randn(options.loss_tokens, options.width, device=device, requires_grad=True)
    head = torch.randn(options.vocab_size, options.width, device=device, requires_grad=True)
    targets = torch.randint(0, options.vocab_size, (options.loss_tokens,), device=device)

    def chunked() -> None:
        torch.autograd.grad(chunked_cross_entropy(hidden, head, targets, options.chunk_size), (hidden, head))

    def plain() -> None:
        loss = F.cross_entropy(F.linear(hidden, head), targets, reduction="sum")
        torch.autograd.grad(loss, (hidden, head))

    memory = []
    for step in (chunked, plain):
        with Counter() as counter:
            counter.see((hidden, head, targets))
            before = counter.now
            step()
        memory.append((counter.peak - before) / 2**20)
    found = {"ours_mib": memory[0], "theirs_mib": memory[1], "memory_ratio": memory[0] / memory[1]}
    return compare(chunked, plain, options.turns) | found


@torch.no_grad()
def uncached(model: Transformer, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy tokens by a whole forward for each."""
    start = ids.shape[1]
    for _ in range(count):
        ids = torch.cat((ids, model.logits(model(ids)[:, -1:]).argmax(-1)), dim=1)
    return ids[:, start:]


def measure_decoding(options: Options) -> dict[str, dict[str, float]]:
    """Cached against uncached, and against transformers."""
    from transformers import AutoModelForCausalLM

    model = build(options)
    ids = torch.randint(0, options.vocab_size, (options.batch_size, options.prompt), device=model.device)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        peer = AutoModelForCausalLM.from_pretrained(folder).to(model.device).eval()

    def ours() -> torch.Tensor:
        return generate(model, list(ids), options.new)

    def theirs() -> torch.Tensor:
        whole = peer.generate(
            ids, max_new_tokens=options.new, do_sample=False, attention_mask=torch.ones_like(ids)
        )
        return whole[:, options.prompt :]

    if not (torch.equal(ours(), theirs()) and torch.equal(ours(), uncached(model, ids, options.new))):
        raise SystemExit("the tokens differ: the times mean nothing")
    return {
        "uncached": compare(ours, lambda: uncached(model, ids, options.new), options.turns),
        "transformers": compare(ours, theirs, options.turns),
    }


def measure_mask(options: Options) -> dict[str, float]:
    """A packed step against a causal one."""
    model = build(options).train()
    ids = torch.randint(0, options.vocab_size, (2, 1024), device=model.device)
    documents = torch.arange(1024, device=model.device).div(128, rounding_mode="floor").expand(2, -1)

    def step(mask: bool) -> None:
        model(ids, mask=document_mask(documents) if mask else None).square().mean().backward()

    return compare(lambda: step(True), lambda: step(False), options.turns)


def _timed(work: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    """Measure and write."""
    options = tyro.cli(Options, description=__doc__.splitlines()[0])
    device = resolve_device(options.device)
    results = {
        "environment": environment(str(device)),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "command": " ".join(["python", "benchmarks/lm.py", *sys.argv[1:]]),
        "options": vars(options),
        "loss": measure_loss(options),
        "decoding": measure_decoding(options),
        "mask": measure_mask(options),
    }
    with whole_file(RESULTS / f"lm-{device.type}.json") as unfinished:
        unfinished.write_text(json.dumps(_rounded(results), indent=1) + "\n", encoding="utf-8")
    print(json.dumps(_rounded(results), indent=1))


if __name__ == "__main__":
    main()
