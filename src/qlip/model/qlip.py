"""QLIP: an image becomes a few binary tokens, from which it is rebuilt and which speak with words.

    image ─ VisionEncoder ─┬─ CLS ─ projection ──────────── image_embeds ─┐
                           └─ patches ─ MLP ─ latents u ─ sign ─ codes    ├─ logits_per_image
    text ── TextEncoder ─── end token ─ projection ──────── text_embeds ──┘
    codes ─ MLP ─ Decoder ─ reconstructions

docs/paper.md section 1 (arXiv 2502.05178, section 3). Module names are those of the published checkpoints, so that
`state_dict()` is the published layout.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from qlip.bits import codes_to_tokens, sub_tokens_to_tokens, tokens_to_codes, tokens_to_sub_tokens
from qlip.errors import InputError
from qlip.model.config import Grid, QLIPConfig
from qlip.model.image import ImageProcessor, as_images
from qlip.model.layers import to_sphere
from qlip.model.quantizer import quantize
from qlip.model.text import TextTokenizer, as_texts
from qlip.model.towers import Decoder, TextEncoder, VisionEncoder

DEFAULT_TEMPLATES = ("a photo of a {}.",)
BATCH_SIZE = 64  # images or texts at once in `tokenize`, `detokenize` and `classify`


@dataclass
class QLIPOutput:
    """What `QLIP.forward` gives; None where its input was not given.

    Attributes:
        image_embeds: (B, P) unit vectors, in float32 whatever the model's dtype.
        text_embeds: (T, P) unit vectors, in float32 likewise.
        logits_per_image: (B, T), exp(logit_scale) · cosine, in float32 likewise.
        latents: (B, N, L) unit vectors u, in float32 likewise.
        codes: (B, N, L) of ±1/√L, with the straight-through gradient.
        reconstructions: (B, 3, H, W) in normalised pixel space.
        features: (B, N, D) patch features Z before the quantizer's down MLP.
        quantized_features: (B, N, D') what the up MLP makes of the codes, Ẑ; D' is the decoder's width.
    """

    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    logits_per_image: Tensor | None = None
    latents: Tensor | None = None
    codes: Tensor | None = None
    reconstructions: Tensor | None = None
    features: Tensor | None = None
    quantized_features: Tensor | None = None


def check_latents(latents: Tensor, name: str, dtype: torch.dtype = torch.float32) -> None:
    """Refuse latents that are no unit vectors: their signs are no tokens.

    Args:
        latents: (B, N, L).
        name: of the model.
        dtype: of its weights.

    Raises:
        InputError: some are not finite or are zero: the weights are damaged, or too large for their dtype.
    """
    norms = latents.norm(dim=-1)
    if not (norms.isfinite() & (norms > 0.5)).all():
        why = "its weights are damaged" if dtype == torch.float32 else f"it overflows in {dtype}"
        raise InputError(
            f"{name!r} gives latents that are not finite, from which no tokens can be made: {why}; "
            "use dtype float32, or another checkpoint"
        )


class QLIP(nn.Module):
    """The tokenizer.

    On tensors: `encode` → `quantize` → `decode`, `encode_image`, `encode_text`, and `forward` for all at
    once. On pictures: `tokenize`, `detokenize`, `classify`.

    Tensors may be of any size in whole patches, (B, 3, H, W) with N = H/patch · W/patch tokens in row-major order:
    where it is not the native size, positions are interpolated. Pictures are brought to `config.size`.

    Attributes:
        config: the model's configuration.
        name: what the tokenizer is called in token files.
        image_processor, text_tokenizer: None where the checkpoint has none; then what needs them says so.
    """

    def __init__(
        self,
        config: QLIPConfig,
        *,
        name: str = "unnamed",
        image_processor: ImageProcessor | None = None,
        text_tokenizer: TextTokenizer | None = None,
    ):
        """Build it with random weights (`qlip.load` reads trained ones)."""
        super().__init__()
        self.config = config
        self.name = name
        self.image_processor = image_processor
        self.text_tokenizer = text_tokenizer
        self.vision_model = VisionEncoder(config)
        self.vision_decoder = Decoder(config.decoder)
        self.text_model = TextEncoder(config.text)
        dim = config.projection_dim
        self.visual_projection = nn.Linear(config.vision.hidden_size, dim, bias=config.vision_projection_bias)
        self.text_projection = nn.Linear(config.text.hidden_size, dim, bias=config.text_projection_bias)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise at random, as CLIP does: matrices by their fan-in, residual outputs by depth too."""
        factor = self.config.initializer_factor
        for module in self.modules():
            reset_layer(module, factor)
        for tower in (self.vision_model, self.vision_decoder, self.text_model):
            layers = tower.encoder.layers
            for name, weight in layers.named_parameters():
                if name.endswith(("out_proj.weight", "w3.weight", "fc2.weight")):
                    weight.data.mul_((2 * len(layers)) ** -0.5)
        nn.init.normal_(self.vision_model.embeddings.class_embedding, std=0.02 * factor)
        nn.init.normal_(self.vision_decoder.position_embeddings, std=0.02 * factor)
        nn.init.constant_(self.logit_scale, self.config.logit_scale_init_value)

    # On tensors

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> QLIPOutput:
        """Everything at once, sharing one pass of the vision encoder.

        Args:
            pixel_values: (B, 3, H, W) normalised.
            input_ids: (T, S) text token ids.
            attention_mask: (T, S) with 1 for real tokens; optional, since the tower is causal and reads its
                result off the end token.
        """
        output = QLIPOutput()
        if pixel_values is not None:
            hidden = self.hidden_states(pixel_values)
            output.image_embeds = self.project(hidden[:, 0])
            output.features = hidden[:, 1:]
            output.latents = self.compress(output.features)
            output.codes = self.quantize(output.latents)
            output.quantized_features = self.expand(output.codes)
            output.reconstructions = self.vision_decoder(output.quantized_features, self.grid_of(pixel_values))
        if input_ids is not None:
            output.text_embeds = self.encode_text(input_ids, attention_mask)
        if output.image_embeds is not None and output.text_embeds is not None:
            output.logits_per_image = self.similarity(output.image_embeds, output.text_embeds)
        return output

    def encode(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) normalised → latents (B, N, L), unit vectors."""
        return self.compress(self.hidden_states(pixel_values)[:, 1:])

    def tokens_of(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) normalised → tokens (B, N) int64 in [0, 2^L).

        Raises:
            InputError: latents are not finite, so that tokens would mean nothing.
        """
        latents = self.encode(pixel_values)
        check_latents(latents, self.name, self.dtype)
        return self.codes_to_tokens(self.quantize(latents))

    def quantize(self, latents: Tensor) -> Tensor:
        """Latents (B, N, L) → codes (B, N, L) of ±1/√L, straight-through."""
        return quantize(latents)

    def decode(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        """Codes (B, N, L) of a grid, `config.grid` by default → (B, 3, H, W) in normalised pixel space."""
        return self.vision_decoder(self.expand(codes), grid or self.config.grid)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) normalised → image_embeds (B, P), unit vectors."""
        return self.project(self.hidden_states(pixel_values)[:, 0])

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(T, S) ids → text_embeds (T, P), unit vectors."""
        context = self.config.text.max_position_embeddings
        if not isinstance(input_ids, Tensor):
            raise InputError(
                f"input_ids are a {type(input_ids).__name__}, not a tensor: pass model.text_tokenizer(texts)[0]"
            )
        if input_ids.ndim != 2:
            raise InputError(f"input_ids are {tuple(input_ids.shape)}, not (T, S): a row for each text")
        if input_ids.shape[1] > context:
            raise InputError(f"input_ids have {input_ids.shape[1]} tokens, the context holds {context}: truncate")
        return to_sphere(self.text_projection(self.text_model(input_ids, attention_mask)))

    # The steps between, for those who train or look inside

    def hidden_states(self, pixel_values: Tensor, kept: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) normalised → (B, 1 + N, D), CLS first, patch features Z after it.

        `kept` (K,) numbers the patches to encode, row-major; None encodes all N.
        """
        self.grid_of(pixel_values)
        return self.vision_model(pixel_values.to(self.dtype), kept=kept)

    def grid_of(self, pixel_values: Tensor) -> Grid:
        """Rows and columns of the tokens of (B, 3, H, W).

        Raises:
            InputError: the shape is another, or H or W is no multiple of the patch size.
        """
        vision = self.config.vision
        if not isinstance(pixel_values, Tensor):
            raise InputError(
                f"pixel_values are a {type(pixel_values).__name__}, not a tensor: "
                "pass model.image_processor(images)"
            )
        if pixel_values.ndim != 4 or pixel_values.shape[1] != vision.num_channels:
            raise InputError(
                f"pixel_values are {tuple(pixel_values.shape)}, this model takes (B, {vision.num_channels}, H, W)"
            )
        return vision.grid_of(*pixel_values.shape[2:])

    def project(self, cls: Tensor) -> Tensor:
        """CLS states (B, D) → image_embeds (B, P), unit vectors."""
        return to_sphere(self.visual_projection(self.vision_model.post_layernorm(cls)))

    def compress(self, features: Tensor) -> Tensor:
        """Patch features Z (B, N, D) → latents (B, N, L), unit vectors, by the down MLP."""
        return self.vision_model.compress(features)

    def expand(self, codes: Tensor) -> Tensor:
        """Codes (B, N, L) → quantized features Ẑ (B, N, D'), by the up MLP."""
        return self.vision_model.expand(codes.to(self.dtype))

    def similarity(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """(B, P) and (T, P) unit vectors → logits_per_image (B, T), in float32 under autocast too."""
        with torch.autocast(image_embeds.device.type, enabled=False):
            return self.logit_scale.to(image_embeds).exp() * image_embeds @ text_embeds.T

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.logit_scale.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.logit_scale.device

    # Codes and token ids

    def codes_to_tokens(self, codes: Tensor) -> Tensor:
        """Codes (B, N, L) → tokens (B, N) int64 in [0, 2^L)."""
        return codes_to_tokens(codes)

    def tokens_to_codes(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N) → codes (B, N, L) of ±1/√L, in the model's dtype."""
        return tokens_to_codes(tokens, self.config.num_bits, self.dtype)

    def tokens_to_sub_tokens(self, tokens: Tensor, bits: int) -> Tensor:
        """Tokens (B, N) → (B, N, L/bits) in [0, 2^bits), most significant first."""
        return tokens_to_sub_tokens(tokens, self.config.num_bits, bits)

    def sub_tokens_to_tokens(self, sub_tokens: Tensor, bits: int) -> Tensor:
        """Sub-tokens (B, N, L/bits) → tokens (B, N)."""
        return sub_tokens_to_tokens(sub_tokens, self.config.num_bits, bits)

    # On pictures

    @torch.no_grad()
    def tokenize(self, images: Any) -> Tensor:
        """Turn pictures into tokens.

        Args:
            images: PIL images, paths, or tensors in [0,1] or uint8; one or many.

        Returns:
            (B, N) int64 in [0, 2^L), on the CPU.
        """
        return torch.cat([self.tokens_of(pixels).cpu() for pixels in self._pixel_batches(images)])

    @torch.no_grad()
    def detokenize(self, tokens: Tensor, grid: Grid | None = None) -> Tensor:
        """Rebuild pictures from tokens.

        Args:
            tokens: (B, N) integers, or (N,) for one picture.
            grid: rows and columns of a picture's tokens; `config.grid` by default.

        Returns:
            (B, 3, H, W) float32 in [0, 1], on the CPU.
        """
        processor = self.need_image_processor()
        tokens = torch.as_tensor(tokens)
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        rows, columns = grid or self.config.grid
        if tokens.ndim != 2 or tokens.shape[1] != rows * columns:
            raise InputError(
                f"tokens are {tuple(tokens.shape)}, but a grid of {rows} × {columns} takes (B, {rows * columns}): "
                "pass the grid that they are of"
            )
        codes = (self.tokens_to_codes(batch.to(self.device)) for batch in tokens.split(BATCH_SIZE))
        return torch.cat([processor.denormalize(self.decode(c, grid).float()).cpu() for c in codes])

    @torch.no_grad()
    def classify(self, images: Any, labels: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES) -> Tensor:
        """Say which of some words fits each picture, without training for them.

        Args:
            images: PIL images, paths, or tensors in [0,1] or uint8; one or many.
            labels: the words, each once; any iterable of strings.
            templates: sentences with `{}` where the word goes; their embeddings are averaged.

        Returns:
            (B, num_labels) float32 probabilities over the labels, on the CPU.

        Raises:
            InputError: a label is there twice, is blank or no string; or an image cannot be read.
        """
        labels = as_texts(labels, "labels")
        if twice := next((label for i, label in enumerate(labels) if label in labels[:i]), None):
            raise InputError(f"label {twice!r} is there twice: leave one out, or tell them apart")
        text = self.embed_labels(labels, templates)
        embeds = (self.encode_image(pixels) for pixels in self._pixel_batches(images))
        return torch.cat([self.similarity(image, text).softmax(-1).cpu() for image in embeds])

    @torch.no_grad()
    def embed_labels(self, labels: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES) -> Tensor:
        """Embed words through templates, as CLIP does: mean of unit vectors, normalised again.

        Returns:
            (num_labels, P) unit vectors.
        """
        if isinstance(templates, (list, tuple)) and (other := [t for t in templates if not isinstance(t, str)]):
            raise InputError(
                f"a template is a {type(other[0]).__name__}: pass strings with {{}} where the word goes"
            )
        labels, templates = as_texts(labels, "labels"), as_texts(templates, "templates")
        if missing := [t for t in templates if "{}" not in t]:
            raise InputError(f"template {missing[0]!r} has no {{}}: put it where the word goes")
        tokenizer = self.need_text_tokenizer()
        texts = (template.replace("{}", label) for label in labels for template in templates)
        embeds = [self.encode_text(tokenizer(b)[0].to(self.device)) for b in _batched(texts, BATCH_SIZE)]
        return to_sphere(torch.cat(embeds).unflatten(0, (len(labels), -1)).mean(1))

    def _pixel_batches(self, images: Any) -> Iterator[Tensor]:
        processor = self.need_image_processor()
        images = as_images(images)
        if len(images) == 0:
            raise InputError("images is empty: pass at least one picture")
        for batch in _batched(images, BATCH_SIZE):
            yield processor(batch).to(self.device)

    def need_image_processor(self) -> ImageProcessor:
        """The image processor; InputError where the checkpoint came without one."""
        if self.image_processor is None:
            raise InputError(
                f"{self.name} has no preprocessor_config.json, so it does not know how to prepare pictures: "
                "set model.image_processor, or pass pixel_values to encode()"
            )
        return self.image_processor

    def need_text_tokenizer(self) -> TextTokenizer:
        """The text vocabulary; InputError where the checkpoint came without one."""
        if self.text_tokenizer is None:
            raise InputError(
                f"{self.name} has no text vocabulary (tokenizer.json, or vocab.json and merges.txt), so it cannot "
                "read words: put CLIP's into the folder, or pass input_ids to encode_text()"
            )
        return self.text_tokenizer

    def save(self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint folder that `qlip.load` reads again; see `qlip.model.checkpoint.save`."""
        from qlip.model.checkpoint import save  # which imports this module

        save(self, folder, dtype=dtype)

    def id_hash(self) -> str:
        """Name of the token ids: a hash of the weights and settings of the encoder and the down MLP.

        Decoders and up MLPs may improve under the same ids. Under one name a picture's ids can still differ in
        a few bits, since the hash does not hold the precision and device that compute them, nor what prepared
        the picture: the image processor and the version of Pillow. Nor does it hold `config.image_size`: at
        another size the same weights make the ids, of another grid.

        Returns:
            16 hexadecimal digits.
        """
        makers = {
            name: p
            for name, p in self.vision_model.named_parameters()
            if name.startswith(("embeddings.", "encoder.", "quant_embed."))
        }
        settings = json.dumps([asdict(self.config.vision), self.config.num_bits], sort_keys=True)
        digest = hashlib.sha256(settings.encode())
        for name, parameter in sorted(makers.items()):
            digest.update(name.encode())
            digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def reset_layer(module: nn.Module, factor: float) -> None:
    """Initialise a matrix, an embedding or a norm at random; other modules stay."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(module.weight, std=factor * module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02 * factor)
    elif isinstance(module, nn.LayerNorm):
        module.reset_parameters()


def _batched(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
