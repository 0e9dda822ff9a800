"""QLIP's configuration as transformers keeps one: the words and values of the published `config.json`.

The dataclasses of `qlip.model.config` say which fields there are, what an absent one means, and what can be built.
"""

from dataclasses import asdict
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from qlip.errors import InputError
from qlip.model.config import ImageTowerConfig, QuantizerConfig, TextConfig
from qlip.model.config import QLIPConfig as TokenizerConfig

SECTIONS = ("vision_config", "text_config", "decoder_config")


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
