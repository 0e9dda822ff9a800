"""Pictures and words, against transformers' CLIP by hand and torchmetrics' CLIPScore."""

import json

import pytest
import torch

import qlip
from qlip.errors import InputError
from qlip.eval.clip_score import ClipMatcher, QlipMatcher

TEXTS = [
    "a red mug",
    "two dogs",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
]  # the last one is too long
PICTURES = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a CLIP of random weights, whose words are letters."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"vocab_size": len(words), "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    vision = small | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=text | {"pad_token_id": 1}, vision_config=vision, projection_dim=16
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor", **sizes})
    )
    return folder


def test_it_is_the_cosine_of_transformers_embeddings(clip):
    matcher = ClipMatcher(str(clip))
    found = matcher(PICTURES, TEXTS)
    assert (matcher.metric, matcher.name) == ("clip_score", str(clip))
    for picture, text, cosine in zip(PICTURES, TEXTS, found, strict=True):
        pixels = matcher.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        ids = matcher.processor.tokenizer(text, return_tensors="pt", truncation=True)
        image = matcher.model.visual_projection(matcher.model.vision_model(pixels).pooler_output)
        words = matcher.model.text_projection(matcher.model.text_model(**ids).pooler_output)
        by_hand = (image @ words.T / (image.norm() * words.norm())).item()
        assert float(cosine) == pytest.approx(by_hand, abs=1e-5)
    assert len({round(float(cosine), 4) for cosine in found}) == 3


def test_it_is_a_hundredth_of_torchmetrics_clipscore(clip):
    clip_score = pytest.importorskip("torchmetrics.functional.multimodal").clip_score
    matcher = ClipMatcher(str(clip))

    class AsItWas(torch.nn.Module):
        """transformers 5 gives more than the embeddings, which torchmetrics 1.9 does not know."""

        config = matcher.model.config

        def get_image_features(self, *inputs):
            return matcher.model.get_image_features(*inputs).pooler_output

        def get_text_features(self, *inputs):
            return matcher.model.get_text_features(*inputs).pooler_output

    for picture, text in zip(PICTURES[:2], TEXTS[:2], strict=True):
        expected = clip_score(picture, text, model_name_or_path=lambda: (AsItWas(), matcher.processor))
        found = float(matcher(picture[None], [text]).clamp(min=0)[0])
        assert 100 * found == pytest.approx(float(expected.detach()), abs=1e-3)


def test_a_qlip_is_its_own_judge_under_another_name(small_model):
    matcher = QlipMatcher(small_model)
    pictures = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    texts = ["a photo of a red square.", "grey square"]
    found = matcher(pictures, texts)
    pixel_values = small_model.image_processor([picture.float() / 255 for picture in pictures])
    embeds = small_model.encode_image(pixel_values), small_model.encode_text(small_model.text_tokenizer(texts)[0])
    torch.testing.assert_close(found, (embeds[0] * embeds[1]).sum(1), rtol=0, atol=1e-5)
    assert (matcher.metric, matcher.name) == ("qlip_score", "small")


def test_what_is_no_clip_is_named(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="is no CLIP of transformers"):
        ClipMatcher(str(tmp_path))
    wordless = qlip.load("qlip-tiny")
    wordless.text_tokenizer = None
    with pytest.raises(InputError, match="no text vocabulary"):
        QlipMatcher(wordless)
