"""QLIP as configurations, models and an image processor of transformers, around the modules of `qlip.model`.

Configurations have the words, weights the names of the published checkpoints, `vision_model.…` in both models.
`export` copies this file beside the weights, for who has not open-qlip.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BatchFeature, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.utils import cached_file, can_return_tuple

from qlip.errors import InputError
from qlip.model.checkpoint import DERIVED, read_companions
from qlip.model.config import Grid, ImageTowerConfig, QuantizerConfig, TextConfig
from qlip.model.config import QLIPConfig as TokenizerConfig
from qlip.model.hub import COMPANIONS, CONFIG
from qlip.model.image import ImageProcessor, as_images
from qlip.model.layers import Blocks, Rotary
from qlip.model.qlip import QLIP, reset_layer
from qlip.model.quantizer import quantize
from qlip.model.towers import Decoder, VisionEmbeddings, VisionEncoder

SECTIONS = ("vision_config", "text_config", "decoder_config")
NO_WEIGHTS = rf"^{DERIVED.pattern}$"


class QLIPVisionConfig(PreTrainedConfig):
    """The vision encoder with the quantizer's MLPs, `vision_config` in the published file.

    Attributes:
        hidden_size, image_size, patch_size, …: as in `qlip.model.config.ImageTowerConfig`.
        quantizer_cfg: as in `qlip.model.config.QuantizerConfig`.
        hidden_size_post_q: width of what the up MLP gives; the encoder's by default.
        quantized_features: the vision model's last hidden state is what comes out of the quantizer: what the up
            MLP makes of the patches' codes, after the CLS of the last block. `hidden_states` has it as one more
            entry, so that -1 is after the quantizer and -2 the last block.
    """

    model_type = "qlip_vision_model"
    base_config_key = "vision_config"

    def __init__(
        self,
        quantizer_cfg: dict[str, Any] | None = None,
        hidden_size_post_q: int | None = None,
        quantized_features: bool = False,
        **kwargs: Any,
    ):
        others = _take(self, asdict(ImageTowerConfig()), kwargs)
        self.quantizer_cfg = asdict(QuantizerConfig()) | (quantizer_cfg or {})
        self.hidden_size_post_q = hidden_size_post_q or self.hidden_size
        self.quantized_features = quantized_features
        super().__init__(**others)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """Read a `config.json`, of a published checkpoint too."""
        config, others = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _as_ours(config, pretrained_model_name_or_path), others

    def tokenizer_config(self) -> TokenizerConfig:
        """A tokenizer of this vision encoder and any decoder and text encoder.

        Raises:
            InputError: it cannot be built.
        """
        decoder = {key: getattr(self, key) for key in ("image_size", "patch_size")}
        decoder |= {"hidden_size": self.hidden_size_post_q, "num_attention_heads": 1}
        vision = self.to_dict()
        return TokenizerConfig.from_dict({"vision_config": vision, "decoder_config": decoder, "text_config": {}})


class QLIPTextConfig(PreTrainedConfig):
    """The text encoder, `text_config` in the published file; see `qlip.model.config.TextConfig`."""

    model_type = "qlip_text_model"
    base_config_key = "text_config"

    def __init__(self, **kwargs: Any):
        super().__init__(**_take(self, asdict(TextConfig()), kwargs))


class QLIPDecoderConfig(PreTrainedConfig):
    """The decoder, `decoder_config` in the published file; see `qlip.model.config.ImageTowerConfig`."""

    model_type = "qlip_decoder_model"
    base_config_key = "decoder_config"

    def __init__(self, **kwargs: Any):
        super().__init__(**_take(self, asdict(ImageTowerConfig()), kwargs))


class QLIPConfig(PreTrainedConfig):
    """The whole tokenizer; see `qlip.model.config.QLIPConfig`.

    Attributes:
        vision_config, text_config, decoder_config: of the three towers.
        projection_dim, vision_projection_bias, …: as in `qlip.model.config.QLIPConfig`.
    """

    model_type = "qlip"
    sub_configs: ClassVar = dict(zip(SECTIONS, (QLIPVisionConfig, QLIPTextConfig, QLIPDecoderConfig), strict=True))

    def __init__(self, **kwargs: Any):
        for section, kind in self.sub_configs.items():
            given = kwargs.pop(section, None) or {}
            setattr(self, section, given if isinstance(given, PreTrainedConfig) else kind(**given))
        defaults = asdict(TokenizerConfig())
        for tower in ("vision", "text", "decoder", "quantizer"):
            del defaults[tower]
        super().__init__(**_take(self, defaults, kwargs))

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """Read a `config.json`, of a published checkpoint too."""
        config, others = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _as_ours(config, pretrained_model_name_or_path), others

    def tokenizer_config(self) -> TokenizerConfig:
        """The same for `qlip.QLIP`.

        Raises:
            InputError: it cannot be built.
        """
        return TokenizerConfig.from_dict(self.to_dict())


def _take(config: PreTrainedConfig, defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Set a section's fields, to defaults where none is given; gives back what is no field."""
    for name, default in defaults.items():
        setattr(config, name, given.get(name, default))
    return {name: value for name, value in given.items() if name not in defaults and name != "model_type"}


def _as_ours(config: dict[str, Any], name: Any) -> dict[str, Any]:
    """The published `config.json` says that it is "clip", as CLIP's own does: say what it is."""
    if config.get("model_type") != "clip":
        return config
    if missing := [section for section in SECTIONS if section not in config]:
        raise InputError(
            f"{str(name)!r} has no {missing[0]} in its config.json, so it is no QLIP checkpoint: "
            "load it with transformers.AutoModel if it is CLIP"
        )
    sections = {s: config[s] | {"model_type": QLIPConfig.sub_configs[s].model_type} for s in SECTIONS}
    return config | sections | {"model_type": QLIPConfig.model_type}


class VisionTransformer(VisionEncoder):
    """The vision encoder, answering as CLIP's in transformers does."""

    def __init__(self, config: QLIPVisionConfig):
        super().__init__(config.tokenizer_config())
        self.config = config

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode pictures.

        Args:
            pixel_values: (B, 3, H, W) normalised, of any size in whole patches.
            output_hidden_states: whether to give them; the config's by default. transformers' LLaVA passes which
                layers it wants: it gets all.
            kwargs: `return_dict`, and what other vision models take.

        Returns:
            last_hidden_state: (B, 1 + N, D), what the last block gives, before any norm, CLS first.
            pooler_output: (B, D), its CLS after `post_layernorm`.
            hidden_states: if asked for, (B, 1 + N, D) each: the embeddings and what each block gives.

        Raises:
            InputError: H or W is no multiple of the patch size, or attentions are asked for.
        """
        if kwargs.get("output_attentions", self.config.output_attentions):
            raise InputError("output_attentions: SDPA gives no attention weights, leave it out")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states: list[Tensor] | None = None if output_hidden_states is False else []
        dtype = self.embeddings.patch_embedding.weight.dtype
        last = super().forward(pixel_values.to(dtype), states)
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=self.post_layernorm(last[:, 0]),
            hidden_states=None if states is None else tuple(states),
        )


class QLIPPreTrainedModel(PreTrainedModel):
    """What both models share."""

    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block", "VisionEmbeddings", "TextEncoder", "Decoder"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [NO_WEIGHTS]  # noqa: RUF012
    vision_model: VisionTransformer

    def __init__(self, config: Any):
        if config._attn_implementation not in (None, "sdpa"):
            raise InputError(
                f"attn_implementation={config._attn_implementation!r}: QLIP computes attention by 'sdpa' alone; "
                "a model around it can have another for its language model: "
                "attn_implementation={'text_config': …, 'vision_config': 'sdpa'}"
            )
        super().__init__(config)

    def _init_weights(self, module: nn.Module) -> None:
        factor = getattr(self.config, "initializer_factor", 1.0)
        reset_layer(module, factor)
        if isinstance(module, Rotary):
            module.refill()  # transformers leaves buffers that are in no checkpoint uninitialised
        elif isinstance(module, VisionEmbeddings):
            nn.init.normal_(module.class_embedding, std=0.02 * factor)
        elif isinstance(module, Decoder):
            nn.init.normal_(module.position_embeddings, std=0.02 * factor)
        elif isinstance(module, QLIPModel):
            nn.init.constant_(module.qlip.logit_scale, self.config.logit_scale_init_value)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether all blocks recompute in the backward pass; what `gradient_checkpointing_enable()` sets."""
        return all(blocks.recompute for blocks in self._blocks())

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        for blocks in self._blocks():
            blocks.recompute = value

    def _blocks(self) -> list[Blocks]:
        return [module for module in self.modules() if isinstance(module, Blocks)]

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.vision_model.embeddings.patch_embedding


class QLIPVisionModel(QLIPPreTrainedModel):
    """The vision encoder alone, in the place of `CLIPVisionModel`.

    It loads from a checkpoint of the whole tokenizer too, and from a LLaVA's whose vision tower it is. With
    `config.quantized_features` it gives what comes out of the quantizer.
    """

    config_class = QLIPVisionConfig
    base_model_prefix = "vision_tower"  # where a LLaVA has it
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        NO_WEIGHTS,
        r"^(text_model|vision_decoder|text_projection|visual_projection)\.|^logit_scale$",
        r"^(language_model|multi_modal_projector|lm_head)\.",
    ]

    def __init__(self, config: QLIPVisionConfig):
        super().__init__(config)
        if config.quantized_features and config.hidden_size_post_q != config.hidden_size:
            raise InputError(
                f"quantized_features: the quantizer gives {config.hidden_size_post_q} dimensions and the encoder "
                f"{config.hidden_size}, so they cannot be layers of one model: leave it out"
            )
        self.vision_model = VisionTransformer(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | int | list[int] | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """As `VisionTransformer.forward`; with `config.quantized_features` one layer more."""
        output = self.vision_model(pixel_values, output_hidden_states, return_dict=True, **kwargs)
        if self.config.quantized_features:
            last, encoder = output.last_hidden_state, self.vision_model
            codes = quantize(encoder.compress(last[:, 1:]))
            patches = encoder.expand(codes.to(last.dtype)).to(last.device)  # the MLPs may be apart from the blocks
            output.last_hidden_state = torch.cat((last[:, :1], patches), dim=1)
            if output.hidden_states is not None:
                output.hidden_states = (*output.hidden_states, output.last_hidden_state)
        return output


class _Tokenizer(QLIP):
    """The tokenizer whose vision encoder answers as CLIP's does."""

    def __init__(self, config: QLIPConfig):
        super().__init__(config.tokenizer_config())
        self.vision_model = VisionTransformer(config.vision_config)

    def hidden_states(self, pixel_values: Tensor, kept: Tensor | None = None) -> Tensor:
        self.grid_of(pixel_values)
        return VisionEncoder.forward(self.vision_model, pixel_values.to(self.dtype), kept=kept)


class QLIPModel(QLIPPreTrainedModel):
    """The whole tokenizer, in the place of `CLIPModel`: images and texts to embeddings, images to codes and back.

    Attributes:
        qlip: the same weights as a `qlip.QLIP`, with all that it can do.
    """

    config_class = QLIPConfig
    qlip: QLIP

    def __init__(self, config: QLIPConfig):
        super().__init__(config)
        qlip = _Tokenizer(config)
        # One set of weights with two faces: whoever replaces a parameter or a module of one replaces the other's.
        self._modules, self._parameters = qlip._modules, qlip._parameters
        self.__dict__["qlip"] = qlip  # no module of this one, or its weights would have two names
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As of any model of transformers; `qlip` gets image processor and vocabulary from beside the weights."""
        where = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            folder = _companions(pretrained_model_name_or_path, where)
            model.qlip.image_processor, model.qlip.text_tokenizer = read_companions(folder, model.qlip.config)
        return loaded

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> CLIPOutput:
        """Embed images, texts or both, and compare them.

        Args:
            input_ids: (T, S) text token ids.
            pixel_values: (B, 3, H, W) normalised.
            attention_mask: (T, S) with 1 for real tokens.

        Returns:
            image_embeds (B, P) and text_embeds (T, P), unit vectors; logits_per_image (B, T) and logits_per_text
            (T, B). None where their input is not given.
        """
        vision = image_embeds = text_embeds = logits = None
        if pixel_values is not None:
            vision = self.vision_model(pixel_values, return_dict=True)
            image_embeds = self.qlip.project(vision.last_hidden_state[:, 0])
        if input_ids is not None:
            text_embeds = self.qlip.encode_text(input_ids, attention_mask)
        if image_embeds is not None and text_embeds is not None:
            text_embeds = text_embeds.to(image_embeds.device)  # where the towers are apart
            logits = self.qlip.similarity(image_embeds, text_embeds)
        return CLIPOutput(
            logits_per_image=logits,
            logits_per_text=None if logits is None else logits.T,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            vision_model_output=vision,  # type: ignore[arg-type]  # None is its default
        )

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As `VisionTransformer.forward`, but pooler_output is (B, P), projected and not normalised."""
        output = self.vision_model(pixel_values, return_dict=True, **kwargs)
        output.pooler_output = self.qlip.visual_projection(output.pooler_output)
        return output

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """pooler_output: (T, P), projected and not normalised."""
        pooled = self.qlip.text_model(input_ids, attention_mask)
        return BaseModelOutputWithPooling(pooler_output=self.qlip.text_projection(pooled))

    def encode(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) normalised → latents (B, N, L), unit vectors."""
        return self.qlip.encode(pixel_values)

    def quantize(self, latents: Tensor) -> Tensor:
        """Latents (B, N, L) → codes (B, N, L) of ±1/√L, straight-through."""
        return self.qlip.quantize(latents)

    def decode(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        """Codes (B, N, L) of a grid, the config's by default → (B, 3, H, W) in normalised pixel space."""
        return self.qlip.decode(codes, grid)

    def codes_to_tokens(self, codes: Tensor) -> Tensor:
        """Codes (B, N, L) → tokens (B, N) int64 in [0, 2^L)."""
        return self.qlip.codes_to_tokens(codes)

    def tokens_to_codes(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N) → codes (B, N, L) of ±1/√L, in the model's dtype."""
        return self.qlip.tokens_to_codes(tokens)


class QLIPImageProcessor(BaseImageProcessor):
    """Gives the pixels that `qlip.load(…).image_processor` gives, bit for bit.

    Attributes:
        size, crop_size, resample, image_mean, …: the fields of a CLIP `preprocessor_config.json`.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(self, **kwargs: Any):
        """Take the fields of a `preprocessor_config.json`; an absent one has CLIP's default.

        Raises:
            InputError: a field is malformed, or asks for another kind of preprocessing.
        """
        fields = ImageProcessor.from_dict(kwargs).to_dict()
        del fields["image_processor_type"]  # transformers writes the class's name
        super().__init__(**kwargs | fields)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Turn pictures into what the model takes.

        Args:
            images: one or many, in any form that `qlip.model.image.read_image` takes; lists may be nested.
            return_tensors: "np" for an array; a tensor by default.
            kwargs: fields that are to differ from the processor's.

        Returns:
            `pixel_values` (B, 3, H, W) float32, normalised.

        Raises:
            InputError: an image cannot be read, or a field is malformed.
        """
        processor = ImageProcessor.from_dict(self.to_dict() | kwargs)
        return BatchFeature({"pixel_values": processor(list(_flat(images)))}, tensor_type=return_tensors)


class QLIPProcessor(ProcessorMixin):
    """Images and texts to what `QLIPModel` takes; what AutoProcessor gives.

    Attributes:
        image_processor: a `QLIPImageProcessor`.
        tokenizer: of the folder's text vocabulary.
    """

    attributes: ClassVar = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # its options are those of the parts
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> "QLIPProcessor":
        """Both parts of a folder or a repository. (AutoImageProcessor needs torchvision in some versions.)"""
        name = pretrained_model_name_or_path
        parts = QLIPImageProcessor.from_pretrained(name, **kwargs), AutoTokenizer.from_pretrained(name, **kwargs)
        return cls(*parts)

    def __call__(
        self, images: Any = None, text: Any = None, return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Prepare images, texts or both.

        Args:
            images: see `QLIPImageProcessor.preprocess`.
            text: a string or several.
            return_tensors: "pt" or "np".
            kwargs: options of the tokenizer, such as `padding` and `truncation`.

        Returns:
            `input_ids` and `attention_mask` of texts, `pixel_values` of images.

        Raises:
            InputError: there is neither, or an image cannot be read.
        """
        if images is None and text is None:
            raise InputError("there are neither images nor text: pass one of them, or both")
        data: dict[str, Any] = {}
        if text is not None:
            data |= self.tokenizer(text, return_tensors=return_tensors, **kwargs)
        if images is not None:
            data |= self.image_processor(images, return_tensors=return_tensors)
        return BatchFeature(data)


_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def _companions(name: Any, where: dict[str, Any]) -> Path:
    """The folder with what lies beside the weights of a folder or a repository, fetched if need be."""
    options = where | {"_raise_exceptions_for_missing_entries": False}
    files = [cached_file(name, file, **options) for file in (CONFIG, *COMPANIONS)]
    return Path(files[0]).parent if files[0] else Path(name)


def _flat(images: Any) -> Iterator[Any]:
    for image in as_images(images):
        if isinstance(image, list | tuple):
            yield from _flat(image)
        else:
            yield image
