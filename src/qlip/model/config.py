"""The tokenizer's configuration, in the words of the published `config.json`, and the published presets.

Every field is named as in the published files, and every default is what an absent key means there, so
that `QLIPConfig.from_dict(json)` and `config.to_dict()` need no table between them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from qlip.errors import InputError, as_integer
from qlip.guarded import check_sizes, typed

Grid = tuple[int, int]
"""Rows and columns of patches, which are those of tokens."""


@dataclass(frozen=True)
class TowerConfig:
    """What every transformer tower has (vision encoder, decoder, text encoder).

    Attributes:
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_hidden_layers: number of blocks.
        num_attention_heads: number of heads; divides `hidden_size`.
        hidden_act: "gelu" (exact), "quick_gelu", "gelu_pytorch_tanh", "relu" or "silu"; SwiGLU ignores it.
        layer_norm_eps: of every LayerNorm in the tower.
        rope: rotary positions in attention.
        swiglu: `w3(LN(silu(w1 x) * w2 x))` in place of `fc2(act(fc1 x))`.
        subln: the extra LayerNorms of EVA-02, before `out_proj` and before `w3`.
        q_bias, k_bias, v_bias: biases of the three projections.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    rope: bool = False
    swiglu: bool = False
    subln: bool = False
    q_bias: bool = True
    k_bias: bool = True
    v_bias: bool = True

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ImageTowerConfig(TowerConfig):
    """A tower over the patches of an image: the vision encoder, or the decoder.

    Attributes:
        image_size: side of the square images whose positions are learnt, in pixels: the native size.
        patch_size: side of a patch, in pixels; divides `image_size`.
        num_channels: 3.
    """

    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3

    @property
    def grid_size(self) -> int:
        """Patches along one side of a native image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a native image, each with a learnt position."""
        return self.grid_size**2

    def grid_of(self, height: int, width: int) -> Grid:
        """Patches of an image of any size, in pixels.

        Raises:
            InputError: a side is no multiple of `patch_size`.
        """
        if min(height, width) < 1 or height % self.patch_size or width % self.patch_size:
            raise InputError(
                f"image_size {height} × {width} holds no whole patches: use multiples of {self.patch_size} pixels"
            )
        return height // self.patch_size, width // self.patch_size


@dataclass(frozen=True)
class TextConfig(TowerConfig):
    """The causal text encoder.

    Attributes:
        vocab_size: rows of the token embedding.
        max_position_embeddings: context length in tokens.
        bos_token_id, eos_token_id, pad_token_id: special ids. `eos_token_id == 2` is CLIP's legacy and
            means "pool at the largest id"; any other means "pool at its first occurrence".
    """

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1


@dataclass(frozen=True)
class QuantizerConfig:
    """Binary spherical quantization, `quantizer_cfg` in the published file.

    Attributes:
        embed_dim: L, the bits of a token.
        group_size: bits estimated jointly in the grouped entropy; divides `embed_dim`.
        inv_temperature: τ of the soft assignment; 1 is almost flat, 100 almost hard.
        beta: weight of the commitment in code space (released code; the paper's is on the latents outside
            both MLPs, see `qlip.train`).
        gamma_0, gamma_1: weights of the per-sample and of the codebook entropy.
        persample_entropy_compute: "group" or "analytical" (each bit on its own).
    """

    embed_dim: int = 28
    group_size: int = 1
    inv_temperature: float = 1.0
    beta: float = 0.0
    gamma_0: float = 1.0
    gamma_1: float = 1.0
    persample_entropy_compute: str = "group"

    @property
    def entropy_group_size(self) -> int:
        """Bits that the entropies take together: 1 in the analytical form."""
        return self.group_size if self.persample_entropy_compute == "group" else 1


@dataclass(frozen=True)
class QLIPConfig:
    """The whole tokenizer.

    Attributes:
        vision, text, decoder: the three towers.
        quantizer: what stands between encoder and decoder.
        projection_dim: width of the space that image and text embeddings share.
        vision_projection_bias, text_projection_bias: biases of the projections into that space.
        logit_scale_init_value: initial `logit_scale`, a logarithm.
        initializer_factor: scales the standard deviations of random initialisation.
        image_size: height and width of the images that it works on, where they are not of the native size;
            positions are then interpolated. See `at_size`.
    """

    vision: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextConfig = field(default_factory=TextConfig)
    decoder: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    projection_dim: int = 512
    vision_projection_bias: bool = False
    text_projection_bias: bool = False
    logit_scale_init_value: float = 2.6592
    initializer_factor: float = 1.0
    image_size: tuple[int, int] | None = None

    def __post_init__(self):
        _check(self)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that it works on, in pixels."""
        return self.image_size or (self.vision.image_size, self.vision.image_size)

    @property
    def grid(self) -> Grid:
        """Rows and columns of an image's tokens."""
        return self.vision.grid_of(*self.size)

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        rows, columns = self.grid
        return rows * columns

    def at_size(self, image_size: int | Sequence[int]) -> "QLIPConfig":
        """The same model, with the same weights, for images of another size.

        Args:
            image_size: side, or height and width, in pixels; multiples of the patch size.

        Raises:
            InputError: it is no such size.
        """
        try:
            sides = image_size if isinstance(image_size, Iterable) else [image_size] * 2
            height, width = (as_integer("image_size", side) for side in sides)
        except ValueError as error:  # also where there are more or fewer than two
            raise InputError(
                f"image_size is {image_size!r}: use a number of pixels, or a height and a width"
            ) from error
        native = height == width == self.vision.image_size
        return replace(self, image_size=None if native else (height, width))

    @property
    def num_bits(self) -> int:
        """Bits of a token."""
        return self.quantizer.embed_dim

    @property
    def hidden_size_post_q(self) -> int:
        """Width of the quantizer's up MLP, which is the decoder's; it may differ from the encoder's."""
        return self.decoder.hidden_size

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "QLIPConfig":
        """Read a published `config.json`. Keys that do not describe the model are ignored.

        Raises:
            InputError: a key has the wrong type, or the model it describes cannot be built.
        """
        for key in ("vision_config", "text_config", "decoder_config"):
            if not isinstance(config.get(key), dict):
                raise InputError(f"config has no section {key!r}: this is not a QLIP tokenizer's config.json")
        vision = config["vision_config"]
        quantizer = typed(dict[str, Any], vision.get("quantizer_cfg") or {}, "config: quantizer_cfg")
        _check_supported(vision, quantizer)
        decoder = _read(ImageTowerConfig, config["decoder_config"])
        if vision.get("hidden_size_post_q", decoder.hidden_size) != decoder.hidden_size:
            raise InputError(
                f"config: vision_config.hidden_size_post_q is {vision['hidden_size_post_q']}, but the decoder "
                f"that takes it has hidden_size {decoder.hidden_size}: make them equal"
            )
        model = _read(
            cls,
            config,
            vision=_read(ImageTowerConfig, vision),
            text=_read(TextConfig, config["text_config"]),
            decoder=decoder,
            quantizer=_read(QuantizerConfig, quantizer),
            image_size=None,
        )
        return model if config.get("image_size") is None else model.at_size(config["image_size"])

    def to_dict(self) -> dict[str, Any]:
        """Write the published `config.json`, every value spelt out; `image_size` only where it is not native."""
        config = asdict(self)
        if self.image_size is None:
            del config["image_size"]
        vision, text, decoder = config.pop("vision"), config.pop("text"), config.pop("decoder")
        quantizer = config.pop("quantizer") | {"input_format": "blc", "l2_norm": True, "soft_entropy": True}
        vision |= {"hidden_size_post_q": self.hidden_size_post_q, "projection_dim": self.projection_dim}
        decoder |= {"hidden_size_post_q": self.hidden_size_post_q}
        text |= {"projection_dim": self.projection_dim}
        vision |= {"quantizer": "bsq", "quantizer_embed_type": "mlp", "quantizer_l2_norm": True}
        return config | {
            "architectures": ["QLIPModel"],
            "model_type": "clip",
            "vision_config": vision | {"quantizer_cfg": quantizer, "model_type": "clip_vision_model"},
            "text_config": text | {"model_type": "clip_text_model"},
            "decoder_config": decoder | {"model_type": "clip_decoder_model"},
        }


def _read(cls, source: dict[str, Any], **given):
    """Build a dataclass from the keys of `source` that it knows; a wrong type is named."""
    values = dict(given)
    for f in fields(cls):
        if f.name in given or f.name not in source:
            continue
        values[f.name] = typed(type(f.default), source[f.name], f"config: {f.name}")
    return cls(**values)


def _check_supported(vision: dict[str, Any], quantizer: dict[str, Any]) -> None:
    supported = {"quantizer": "bsq", "quantizer_embed_type": "mlp", "quantizer_l2_norm": True}
    for section, name, only in [(vision, k, v) for k, v in supported.items()] + [
        (quantizer, "l2_norm", True),
        (quantizer, "input_format", "blc"),
        (quantizer, "soft_entropy", True),
    ]:
        if section.get(name, only) != only:
            raise InputError(f"config: {name} is {section[name]!r}, but only {only!r} is QLIP's quantizer")


def _check(config: QLIPConfig) -> None:
    """Reject what cannot be built, naming field, value and remedy."""
    vision, text, decoder, quantizer = config.vision, config.text, config.decoder, config.quantizer
    check_sizes({"projection_dim": config.projection_dim})
    for name, tower in {"vision": vision, "text": text, "decoder": decoder}.items():
        counts = [f.name for f in fields(tower) if f.type is int and not f.name.endswith("_token_id")]
        check_sizes({f"{name}.{count}": getattr(tower, count) for count in counts})
        if tower.hidden_size % tower.num_attention_heads:
            raise InputError(
                f"{name}.hidden_size {tower.hidden_size} is not a multiple of "
                f"num_attention_heads {tower.num_attention_heads}"
            )
        axes = 1 if name == "text" else 2
        if tower.rope and tower.head_dim % (2 * axes):
            raise InputError(f"{name}: rotary positions need a head width divisible by {2 * axes}")
        if not 0 < tower.layer_norm_eps < 1:  # nor NaN
            raise InputError(f"{name}.layer_norm_eps is {tower.layer_norm_eps}: it must be above 0, such as 1e-5")
        if tower.hidden_act not in ACTIVATIONS:
            raise InputError(f"{name}.hidden_act is {tower.hidden_act!r}: use one of {ACTIVATIONS}")
    for name, image_tower in {"vision": vision, "decoder": decoder}.items():
        if image_tower.image_size % image_tower.patch_size:
            raise InputError(
                f"{name}.image_size {image_tower.image_size} is not a multiple of "
                f"patch_size {image_tower.patch_size}"
            )
    if vision.grid_size != decoder.grid_size:
        raise InputError(f"vision has {vision.grid_size} patches a side and decoder {decoder.grid_size}")
    rows, columns = vision.grid_of(*config.size)
    check_sizes({"num_patches": vision.num_patches, "number of tokens": rows * columns})
    if not 1 <= quantizer.embed_dim <= 63:
        raise InputError(f"quantizer.embed_dim is {quantizer.embed_dim}: a token has 1 to 63 bits")
    if quantizer.group_size < 1 or quantizer.embed_dim % quantizer.group_size:
        raise InputError(
            f"quantizer.group_size {quantizer.group_size} does not divide embed_dim {quantizer.embed_dim}"
        )
    if quantizer.inv_temperature <= 0:
        raise InputError(f"quantizer.inv_temperature is {quantizer.inv_temperature}: it must be positive")
    if quantizer.persample_entropy_compute not in ("group", "analytical"):
        raise InputError(
            f"quantizer.persample_entropy_compute is {quantizer.persample_entropy_compute!r}: "
            "use 'group' or 'analytical'"
        )


ACTIVATIONS = ("gelu", "quick_gelu", "gelu_pytorch_tanh", "relu", "silu")


def _eva02(width: int, heads: int, layers: int, mlp: int, image_size: int, patch_size: int) -> ImageTowerConfig:
    """An EVA-02 tower: rotary, SwiGLU, sub-LN, no bias on k, eps 1e-6."""
    return ImageTowerConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        intermediate_size=mlp,
        image_size=image_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,
        rope=True,
        swiglu=True,
        subln=True,
        k_bias=False,
    )


def _published(tower: ImageTowerConfig, text: TextConfig) -> QLIPConfig:
    return QLIPConfig(
        vision=tower,
        decoder=tower,
        text=replace(text, eos_token_id=2),
        projection_dim=text.hidden_size,
        vision_projection_bias=True,
    )


_TEXT_L = TextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)

PRESETS: dict[str, QLIPConfig] = {
    "b16-256": _published(_eva02(768, 12, 12, 2048, image_size=256, patch_size=16), TextConfig()),
    "b8-256": _published(_eva02(768, 12, 12, 2048, image_size=256, patch_size=8), TextConfig()),
    "l14-392": _published(_eva02(1024, 16, 24, 2730, image_size=392, patch_size=14), _TEXT_L),
    # Ours, for a laptop: 64-pixel images as 64 tokens, 16 MB in bfloat16.
    "tiny": QLIPConfig(
        vision=_eva02(256, 4, 6, 352, image_size=64, patch_size=8),
        decoder=_eva02(256, 4, 6, 352, image_size=64, patch_size=8),
        text=TextConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=3584,
            max_position_embeddings=32,
            bos_token_id=3582,
            eos_token_id=3583,
            pad_token_id=3583,
        ),
        # At τ = 1 the entropies are almost flat (docs/paper.md section 2), and a first trial collapsed to 3 bits.
        quantizer=QuantizerConfig(inv_temperature=10.0),
        projection_dim=256,
    ),
}
"""The three published tokenizers (docs/paper.md, section 1) and ours for a laptop, by name."""
