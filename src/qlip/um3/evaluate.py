"""What a unified model makes of text and pictures that it was not trained on."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qlip.data.samples import evenly
from qlip.lm.loss import IGNORED, chunked_cross_entropy
from qlip.um3.layout import image_to_text, text_to_image
from qlip.um3.model import UM3
from qlip.um3.sources import Pictures, Text

AT_ONCE = 16  # documents


@torch.no_grad()
def held_out_text(model: UM3, text: Text, max_documents: int) -> dict[str, float]:
    """How well it knows text; with a model just made of a Llama without QK-norm, that is how well the Llama does.

    Args:
        model: in evaluation mode.
        text: tokenized for it.
        max_documents: so many, evenly spread; of each what its context holds, from the beginning.

    Returns:
        `text_nats_per_token` over the text vocabulary (of a joint softmax over all ids), and e to that,
        `text_perplexity`; and `attention_norms` of a few of the documents.
    """
    longest = model.config.lm.max_position_embeddings
    documents = [text.document(i)[:longest].tolist() for i in evenly(len(text), max_documents)]
    nats, count = _nats(model, documents, [1] * len(documents), visual=False)
    per_token = nats / count
    perplexity = {"text_nats_per_token": per_token, "text_perplexity": math.exp(min(per_token, 700))}
    return perplexity | attention_norms(model, documents[:AT_ONCE])


@torch.no_grad()
def attention_norms(model: UM3, documents: Sequence[list[int]]) -> dict[str, float]:
    """How long queries and keys have become; without QK-norm they may grow.

    Returns:
        `query_norm` and `key_norm`, the mean length of a head's query and key over all layers; and
        `max_attention_scale`, the largest product of a head's two over √head_dim: about the most that its scores
        before the softmax can be.
    """
    with _norms(model) as norms:
        for document in documents:
            model.lm(torch.tensor([document], device=model.device))
    queries, keys = torch.stack(norms[::2]), torch.stack(norms[1::2])
    scales = queries * keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    by_head = scales.view(len(documents), -1).mean(0) / model.config.lm.head_width**0.5
    return {
        "query_norm": float(queries.mean()),
        "key_norm": float(keys.mean()),
        "max_attention_scale": float(by_head.max()),
    }


@torch.no_grad()
def held_out_pictures(model: UM3, pictures: Pictures, max_pictures: int) -> dict[str, float]:
    """How well it knows pictures by their captions, and captions by their pictures.

    Args:
        model: in evaluation mode.
        pictures: of its ids.
        max_pictures: so many, evenly spread.

    Returns:
        `bits_per_image` of text→image, of which a random guess needs all that a picture's tokens have, and
        `caption_nats_per_token` of image→text, the end of the text counted as a token.
    """
    config = model.config
    indices = evenly(len(pictures), max_pictures)
    found = pictures.read(indices, indices)
    drawn = [text_to_image(caption, tokens, config) for _, tokens, caption in found]
    described = [image_to_text(tokens, caption, config) for _, tokens, caption in found]
    nats, _ = _nats(model, drawn, [1] * len(drawn), visual=True)
    caption_nats, count = _nats(model, described, [config.num_image_tokens + 3] * len(described), visual=False)
    return {"bits_per_image": nats / math.log(2) / len(found), "caption_nats_per_token": caption_nats / count}


def _nats(model: UM3, documents: list[list[int]], first: list[int], visual: bool) -> tuple[float, int]:
    """−ln p of the text or the visual tokens of documents, each from a place on, and how many they are."""
    config, head = model.config, model.lm.head
    start = 0
    if config.softmax == "separate":
        start = config.num_text if visual else 0
        head = head[config.num_text :] if visual else head[: config.num_text]
    total, count = 0.0, 0
    for at in range(0, len(documents), AT_ONCE):
        some = [torch.tensor(document) for document in documents[at : at + AT_ONCE]]
        ids = pad_sequence(some, batch_first=True, padding_value=-1)
        counted = torch.arange(ids.shape[1]) >= torch.tensor(first[at : at + AT_ONCE])[:, None]
        counted &= (ids >= config.num_text) if visual else (ids >= 0) & (ids < config.num_text)
        targets = torch.where(counted, ids - start, IGNORED)[:, 1:]
        # What comes after a document none of its tokens sees.
        hidden = model.lm(ids[:, :-1].clamp(min=0).to(model.device))
        total += float(chunked_cross_entropy(hidden, head, targets.to(model.device)))
        count += int((targets != IGNORED).sum())
    return total, count


@contextmanager
def _norms(model: UM3) -> Iterator[list[Tensor]]:
    """Collects (heads,) mean lengths of queries and of keys, by turns, of each layer that is called meanwhile."""
    found: list[Tensor] = []

    def measure(module: torch.nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
        found.append(output.float().norm(dim=-1).flatten(0, -2).mean(0))

    names = [f"layers.{i}.self_attn.{part}_norm" for i in range(len(model.lm.layers)) for part in "qk"]
    parts = [model.lm.get_submodule(name) for name in names]
    hooks = [part.register_forward_hook(measure) for part in parts]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
