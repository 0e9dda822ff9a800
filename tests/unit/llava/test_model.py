"""What is put together is transformers' LLaVA: it sees the tokenizer's features, and reads back the same."""

import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models

import qlip
from qlip.errors import InputError

transformers = pytest.importorskip("transformers")
from qlip.llava.data import num_image_tokens, render  # noqa: E402
from qlip.llava.model import CHAT_TEMPLATE, build, load  # noqa: E402


@pytest.mark.parametrize(("source", "layer"), [("layer-2", -2), ("layer-1", -1), ("quantizer", -1)])
def test_the_projector_sees_the_tokenizers_features(llm, photos, source, layer):
    model, processor = build("qlip-tiny", llm, source)
    eye = qlip.load("qlip-tiny")
    pixel_values = eye.image_processor(photos[:2])
    with torch.inference_mode():
        hidden, states = eye.vision_model.embeddings(pixel_values), []
        rotary = eye.vision_model.rope.at(eye.grid_of(pixel_values)).tables
        for block in eye.vision_model.encoder.layers:
            hidden = block(hidden, rotary, None, False)
            states.append(hidden)
        expected = {
            "layer-2": states[-2][:, 1:],
            "layer-1": eye.hidden_states(pixel_values)[:, 1:],
            "quantizer": eye.expand(eye.quantize(eye.encode(pixel_values))),
        }[source]
        found = torch.stack(list(model.get_image_features(pixel_values).pooler_output))
        difference = (found - model.model.multi_modal_projector(expected)).abs().max()
    assert (
        difference < 1e-6
    )  # measured: 0, and 2e-8 after the quantizer, where the MLP sees rows of another stride
    assert model.config.vision_feature_layer == layer
    assert num_image_tokens(processor) == model.config.image_seq_length == 64


def test_a_saved_folder_is_transformers_own(llm, photos, tmp_path):
    model, processor = build("qlip-tiny", llm)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    hello = [{"role": "user", "content": "<image>\nhi"}]
    text = render(processor.tokenizer, hello, None, prompt=True)
    inputs = processor(images=[Image.open(photos[0])], text=[text], return_tensors="pt")
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    other = transformers.AutoProcessor.from_pretrained(tmp_path)
    theirs = other(images=[Image.open(photos[0])], text=[text], return_tensors="pt")
    for name, value in inputs.items():
        assert torch.equal(theirs[name], value), name
    with torch.inference_mode():
        logits = model(**inputs).logits
        assert torch.equal(again.eval()(**theirs).logits, logits)
        assert torch.equal(load(tmp_path)[0](**inputs).logits, logits)
    assert other.tokenizer.chat_template == CHAT_TEMPLATE == other.chat_template


def test_the_language_model_speaks_as_before(llm):
    """Its logits on words alone, but for the row that the image token has."""
    model, processor = build("qlip-tiny", llm)
    words = transformers.AutoModelForCausalLM.from_pretrained(llm).eval()
    input_ids = processor.tokenizer("a red square", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        before, now = words(input_ids).logits, model(input_ids=input_ids).logits
    assert now.shape[-1] == before.shape[-1] + 1
    assert torch.equal(now[..., :-1], before)


def test_llava_words():
    """The words of LLaVA-1.5, as its published processors have them, in both forms of a message."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>")
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    for asked in ("<image>\nWhat is this?", parts):
        chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": "A dog."}]
        text = tokenizer.apply_chat_template(chat, chat_template=CHAT_TEMPLATE, tokenize=False)
        assert text.endswith("questions. USER: <image>\nWhat is this? ASSISTANT: A dog.</s>")
        prompt = tokenizer.apply_chat_template(
            chat[:1], chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
        )
        assert prompt.endswith("USER: <image>\nWhat is this? ASSISTANT:")


def test_what_cannot_be_put_together(llm, tmp_path):
    with pytest.raises(InputError, match="choose one of layer-2, layer-1, quantizer"):
        build("qlip-tiny", llm, "layer-3")
    with pytest.raises(InputError, match="llm '.*nowhere' cannot be read"):
        build("qlip-tiny", tmp_path / "nowhere")
    with pytest.raises(InputError, match="qlip-huge"):
        build("qlip-huge", llm)
    with pytest.raises(InputError, match="is not a LLaVA folder"):
        load(llm)
    build("qlip-tiny", llm)[0].save_pretrained(tmp_path / "half")
    with pytest.raises(InputError, match="is not a LLaVA folder"):
        load(tmp_path / "half")  # without its processor


@pytest.mark.parametrize(
    ("hidden", "said"), [("transformers", "open-qlip\\[transformers\\]"), ("peft", "open-qlip\\[llava\\]")]
)
def test_a_missing_library_is_named(hidden, said, llm):
    code = f"""
import importlib.metadata as metadata, sys
real = metadata.version
def version(name):
    if name == {hidden!r}:
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
sys.modules[{hidden!r}] = None
from qlip.errors import InputError
try:
    from qlip.llava import build
    from qlip.llava.task import LlavaTask, LlavaTaskConfig
    from qlip.train.parallel import ComputeConfig
    LlavaTask(build("qlip-tiny", {str(llm)!r})[0], LlavaTaskConfig(lora_rank=2), ComputeConfig(), 2)
except InputError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.search(said, result.stdout), result.stdout + result.stderr
