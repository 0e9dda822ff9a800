"""From a model and prompts to new tokens: one pass over the prompts, then one token a step."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qlip.errors import InputError, as_integer
from qlip.lm.transformer import Cache, Transformer


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits, in this order; the defaults draw from the model's own distribution.

    Attributes:
        guidance_scale: s in unconditional + s · (conditional − unconditional), on logits; 1 is without guidance.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only so many of the likeliest; 0: all.
        top_p: only the likeliest whose probabilities together reach it; 1: all.
        min_p: only those at least this times as likely as the likeliest; 0: all.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "top_k", as_integer("top_k", self.top_k))
        for name in ("guidance_scale", "temperature", "top_k"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}: it must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}: it must be above 0 and at most 1 (all tokens)")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p is {self.min_p}: it must be from 0 (all tokens) to 1")


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Parts:
    """Tokens that are drawn part by part from one hidden state, and read as a whole.

    Attributes:
        count: S, parts of a token.
        embed: (B, S) ids → (B, D), what the transformer reads.
        logits: (B, D) hidden states and the (B, s) parts that are drawn → (B, V) logits of the next part.
    """

    count: int
    embed: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Tensor],
    num_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    seeds: Sequence[int] | None = None,
    unconditional: Sequence[Tensor] | None = None,
    stop_ids: Sequence[int] = (),
    allowed: Callable[[Tensor], Tensor] | None = None,
    positions: Tensor | None = None,
    slots: Tensor | None = None,
    parts: Parts | None = None,
    compile: bool = False,
) -> Tensor:
    """Go on from prompts. A row's tokens do not depend on the others in its batch, but for how logits are rounded.

    Args:
        model: in evaluation mode.
        prompts: of each row its ids (T,), or embeddings (T, D); the lengths may differ.
        num_tokens: how many new ones.
        sampling: how they are drawn.
        seeds: of each row; a seed draws the same random numbers on every device. By default 0, 1, 2, …
        unconditional: of each row the prompt without its condition; both go through the model as one batch of two
            halves. Not used with a `guidance_scale` of 1.
        stop_ids: tokens that end a row; it is filled up with the one that did.
        allowed: called before each token with those that are there, (B, t), gives which may come next, as booleans
            broadcastable to (B, vocab_size). By default all may.
        positions: (num_tokens, 2) rows and columns of the new tokens, with `rope_axes` 2; the prompts stand at
            (0, 0), unrotated.
        slots: (num_tokens,) which sub-tokens of their places the new tokens are, with `num_slots`.
        parts: how a token is drawn and read that is no single id; then there are no `stop_ids` and `allowed`.
        compile: compile the step, on a GPU as CUDA graphs. The first batch of each shape (rows, longest prompt and
            new tokens) waits for it, and PyTorch compiles for no more than eight.

    Returns:
        (B, num_tokens) int64 ids; fewer if all rows ended before. With `parts` (B, num_tokens, S).

    Raises:
        InputError: the arguments do not fit each other or the model, all is longer than the model's context, or
            the model's logits are not finite.
    """
    guided, device = sampling.guidance_scale != 1, model.device
    num_tokens = as_integer("num_tokens", num_tokens)
    seeds = range(len(prompts)) if seeds is None else seeds
    unconditional = unconditional if guided else None
    _check(model, prompts, num_tokens, guided, seeds=seeds, unconditional=unconditional)
    _check_new(model, num_tokens, positions=positions, slots=slots)
    if parts is not None and (stop_ids or allowed is not None or slots is not None):
        raise InputError("stop_ids, allowed and slots are of tokens that are one id: leave them out with parts")

    count = 1 if parts is None else parts.count
    inputs, padding = _left_padded(model, [*prompts, *(unconditional or ())])
    cache = Cache(model, padding, inputs.shape[1] + num_tokens - 1)
    step = _compiled_step(cache) if compile else _step
    noise = torch.stack([_noise(seed, num_tokens * count) for seed in seeds], dim=1).to(device)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    tokens = torch.empty(len(prompts), num_tokens, count, dtype=torch.long, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    finite = torch.ones(len(prompts), dtype=torch.bool, device=device)
    places = None if positions is None else positions.to(device)
    numbers = [None] * num_tokens if slots is None else slots.to(device)

    unrotated = None if places is None else places.new_zeros(1, inputs.shape[1], 2)
    hidden = model(inputs, unrotated, cache=cache)[:, -1]
    for i in range(num_tokens):
        if i:
            last = tokens[:, i - 1]
            x = model.embed(last[:, 0], numbers[i - 1]) if parts is None else parts.embed(last)
            hidden = step(
                model, cache, _twice(x, guided)[:, None], None if places is None else places[None, i - 1 : i]
            )
        for j in range(count):
            drawn = _twice(tokens[:, i, :j], guided)
            logits = model.logits(hidden) if parts is None else parts.logits(hidden, drawn)
            scores = guide(logits, sampling.guidance_scale) if guided else logits
            if allowed is not None:
                scores = scores.masked_fill(~allowed(tokens[:, :i, 0]), -torch.inf)
            finite &= scores.amax(-1).isfinite()
            tokens[:, i, j] = sample(scores, sampling, noise[i * count + j])
        if stop_ids:
            tokens[:, i] = torch.where(ended[:, None], tokens[:, i - 1], tokens[:, i])
            ended |= torch.isin(tokens[:, i, 0], stops)
            if ended.all():
                tokens = tokens[:, : i + 1]
                break
    if not finite.all():  # looked at once: a look at each step would wait for the GPU
        raise InputError(
            f"the model's logits are not finite in {int((~finite).sum())} of {len(prompts)} rows: "
            "use an earlier checkpoint, or load it in float32"
        )
    return tokens[..., 0] if parts is None else tokens


def guide(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: (2B, V), the conditional half first → (B, V) float32."""
    conditional, unconditional = logits.float().chunk(2)
    return unconditional + scale * (conditional - unconditional)


def sample(logits: Tensor, sampling: Sampling, noise: Tensor) -> Tensor:
    """Draw a token for each row; nothing here is random but `noise`.

    Args:
        logits: (B, V); what may not be drawn is -inf.
        sampling: its guidance lies behind (`guide`).
        noise: (B,) float32 in [0, 1): where in the cumulative distribution the token stands.

    Returns:
        (B,) int64 ids in [0, V), also of a row without a finite maximum, which `generate` refuses.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities, place = restrict(logits, sampling).softmax(-1), logits.device
    if place.type == "mps":  # it has no doubles
        probabilities, noise = probabilities.cpu(), noise.cpu()
    cumulative = probabilities.double().cumsum(-1)
    # 24 bits of noise times a double stay below the sum, so that no token of probability 0 is found.
    found = torch.searchsorted(cumulative, noise.double()[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1).to(place)


def restrict(logits: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) logits → float32, divided by the temperature, with -inf for what top-k, top-p and min-p leave out."""
    scores = logits.float()
    if sampling.temperature < 1e-3:  # a division by it may overflow: let the maximum be 0
        scores = scores - scores.amax(-1, keepdim=True)
    scores = scores / max(sampling.temperature, 1e-30)  # which has a finite inverse in float32
    if 0 < sampling.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scores.sort()
        out = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        out[:, -1] = False  # the likeliest always stays
        scores = scores.masked_fill(out.scatter(1, order, out), -torch.inf)
    if sampling.min_p > 0:
        probabilities = scores.softmax(-1)
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        scores = scores.masked_fill(probabilities < least, -torch.inf)
    return scores


def _step(model: Transformer, cache: Cache, x: Tensor, place: Tensor | None) -> Tensor:
    """(B, 1, D) embeddings, and what `positions` says of them → (B, D) hidden states."""
    return model(x, place, cache=cache)[:, -1]


def _twice(rows: Tensor, guided: bool) -> Tensor:
    """Rows for the conditional and the unconditional half."""
    return torch.cat((rows, rows)) if guided else rows


def _compiled_step(cache: Cache) -> Callable[..., Tensor]:
    """The step compiled; its CUDA graphs write to the cache where it lies."""
    for tensor in (*cache.keys, *cache.values, cache.length):
        torch._dynamo.mark_static_address(tensor)
    return _compiled(cache.length.device.type)


@functools.cache
def _compiled(device_type: str) -> Callable[..., Tensor]:
    return torch.compile(_step, dynamic=False, mode="reduce-overhead" if device_type == "cuda" else None)


def _noise(seed: int, count: int) -> Tensor:
    """(count,) float32, on the CPU, whose generator is the same everywhere."""
    return torch.rand(count, generator=torch.Generator().manual_seed(as_integer("seed", seed)))


def _left_padded(model: Transformer, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids and embeddings → embeddings (B, T, D), and how many places are empty at each row's beginning (B,)."""
    rows = [row.to(model.device) for row in prompts]
    rows = [row.to(model.dtype) if row.is_floating_point() else model.embed(row) for row in rows]
    inputs = pad_sequence(rows, batch_first=True, padding_side="left")
    return inputs, torch.tensor([inputs.shape[1] - len(row) for row in rows], device=model.device)


def _check(model: Transformer, prompts: Sequence[Tensor], num_tokens: int, guided: bool, **rows) -> None:
    if not prompts or not all(len(row) for row in (*prompts, *(rows["unconditional"] or ()))):
        raise InputError("a prompt is empty: it needs one token at least, such as the beginning of a text")
    if num_tokens < 1:
        raise InputError(f"num_tokens is {num_tokens}: it must be at least 1")
    if model.training and model.config.dropout:
        raise InputError("the model is in training mode, with dropout: call its eval() first")
    if guided and rows["unconditional"] is None:
        raise InputError("guidance_scale is not 1, but there are no unconditional prompts: pass one for each row")
    for name, values in rows.items():
        if values is not None and len(values) != len(prompts):
            raise InputError(f"{name} has {len(values)} entries for {len(prompts)} prompts: pass one for each")


def _check_new(model: Transformer, num_tokens: int, **tables: Tensor | None) -> None:
    if (tables["positions"] is not None) != (model.config.rope_axes == 2):
        raise InputError(f"rope_axes is {model.config.rope_axes}: positions are for 2, where they must be")
    for name, table in tables.items():
        if table is not None and len(table) != num_tokens:
            raise InputError(f"{name} has {len(table)} entries for {num_tokens} new tokens: pass one for each")
