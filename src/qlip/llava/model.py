"""LLaVA-1.5 with QLIP in CLIP's place: `transformers`' own model, put together and read back.

Of `qlip.llava` the one file that imports `transformers` (extra `llava`).
"""

import os
from typing import Any, Literal, get_args

import torch

from qlip.integrations.transformers import QLIPVisionConfig, QLIPVisionModel  # first: it says what is missing

# isort: split
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers import __version__ as transformers_version
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from qlip.environment import resolve_device
from qlip.errors import InputError, MissingExtra, one_line
from qlip.llava.data import IMAGE
from qlip.model.checkpoint import load as load_qlip
from qlip.model.image import ImageProcessor

try:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
except ImportError as error:
    raise MissingExtra(
        f"transformers {transformers_version} has no image processor that pads for LLaVA without torchvision: "
        "pip install 'open-qlip[llava]'"
    ) from error

FeatureSource = Literal["layer-2", "layer-1", "quantizer"]

# LLaVA-1.5's words, for a language model that has no chat template. The tokenizer puts its beginning-of-text
# token before them. What a message says is a string, or a list of parts, as pipelines have it.
CHAT_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. "
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>\\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{{ ' ' if message['role'] == 'user' else eos_token }}"
    "{% endfor %}"
    "{{ 'ASSISTANT:' if add_generation_prompt }}"
)


def build(
    vision: str | os.PathLike[str],
    llm: str | os.PathLike[str],
    feature_source: FeatureSource = "layer-2",
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Put a tokenizer and a language model together; the projector between them is random.

    Args:
        vision: as for `qlip.load`.
        llm: folder or hub name of a causal language model, such as Vicuna-1.5-7B.
        feature_source: the patch features that the projector sees: of the layer before the last ("layer-2", the
            paper's choice), of the last one ("layer-1"), or what the quantizer's up MLP makes of the codes
            ("quantizer"). Without the CLS token each.

    Returns:
        The model in float32, in eval mode, with a row for the image token in its embeddings; and its processor,
        which pads pictures to squares of the mean colour. Both have `save_pretrained`; what that writes is read by
        `load`, and by `transformers` once `qlip.integrations.transformers` is imported.

    Raises:
        InputError: one of the two cannot be read, or pictures are not square.
    """
    if feature_source not in get_args(FeatureSource):
        raise InputError(
            f"feature_source is {feature_source!r}: choose one of {', '.join(get_args(FeatureSource))}"
        )
    tower, image_processor = _read_eye(vision, quantized=feature_source == "quantizer")
    text, tokenizer = _read_language_model(llm)
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    if len(tokenizer) > text.config.vocab_size:
        text.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # the new row is neither read nor said
    processor = LlavaProcessor(
        image_processor=_square(image_processor),
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text.config,
        image_token_index=processor.image_token_id,
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        vision_feature_layer=-2 if feature_source == "layer-2" else -1,
        vision_feature_select_strategy="default",
    )
    with torch.device("meta"):  # or all of it would be made at random first
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model = tower, text.get_decoder()
    model.lm_head = text.get_output_embeddings()
    model.model.multi_modal_projector = LlavaMultiModalProjector(config)
    model.generation_config = text.generation_config
    model.tie_weights()
    return model.eval(), processor


def load(
    folder: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Read a folder that `build` or a training left.

    Returns:
        The model in float32, in eval mode, and its processor.

    Raises:
        InputError: it is no such folder.
    """
    place = resolve_device(device)
    try:
        if not isinstance(AutoConfig.from_pretrained(folder), LlavaConfig):
            raise InputError("its config.json is of another model")
        model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        processor = LlavaProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{os.fspath(folder)!r} is not a LLaVA folder ({one_line(error)})") from error
    return model.to(place).eval(), processor


def copy_of(
    model: LlavaForConditionalGeneration, tensors: dict[str, torch.Tensor]
) -> LlavaForConditionalGeneration:
    """A model of the same configuration around other tensors, in eval mode."""
    copy: Any = LlavaForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=tensors)
    copy.generation_config = model.generation_config
    return copy.to(model.device).eval()


def _read_eye(name: str | os.PathLike[str], quantized: bool) -> tuple[QLIPVisionModel, ImageProcessor]:
    """The vision tower of a tokenizer; `quantized`: with what is behind the quantizer as its last features."""
    qlip = load_qlip(name)
    fields = {k: v for k, v in qlip.config.to_dict()["vision_config"].items() if k != "model_type"}
    config = QLIPVisionConfig(**fields, quantized_features=quantized)
    weights = {f"vision_model.{name}": tensor for name, tensor in qlip.vision_model.state_dict().items()}
    tower = QLIPVisionModel.from_pretrained(None, config=config, state_dict=weights)
    return tower, qlip.need_image_processor()


def _square(processor: ImageProcessor) -> LlavaImageProcessorPil:
    """LLaVA's processor, which pads, with the tokenizer's sizes and colours; on squares both do the same."""
    height, width = processor.size
    if height != width:
        raise InputError(f"the tokenizer takes pictures of {height} × {width}: LLaVA pads to squares")
    return LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": processor.resize},
        crop_size={"height": height, "width": width},
        resample=processor.resample,
        image_mean=list(processor.mean),
        image_std=list(processor.std),
    )


def _read_language_model(name: str | os.PathLike[str]) -> tuple[Any, Any]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"llm {os.fspath(name)!r} cannot be read ({one_line(error)})") from error
    if not tokenizer.is_fast:
        raise InputError(f"llm {os.fspath(name)!r} has a slow tokenizer: give it a tokenizer.json")
    return model, tokenizer
