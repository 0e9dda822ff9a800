"""QLIP: its towers against `transformers`, its contract, and pictures in and out."""

import copy
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModel

import qlip
import qlip.model.qlip
from qlip.errors import InputError
from qlip.model import QLIP, ImageTowerConfig, QLIPConfig, QuantizerConfig, TextConfig
from qlip.model.config import ACTIVATIONS
from qlip.model.image import ImageProcessor
from qlip.model.text import TextTokenizer

EVA = {"rope": True, "swiglu": True, "subln": True, "k_bias": False, "layer_norm_eps": 1e-6}
VISION = ImageTowerConfig(32, 40, 2, 2, image_size=16, patch_size=4, **EVA)
DECODER = ImageTowerConfig(24, 36, 1, 2, image_size=24, patch_size=6, **EVA)  # other sizes, the same grid
TEXT = TextConfig(24, 48, 2, 3, vocab_size=600, max_position_embeddings=12, eos_token_id=2)
CONFIG = QLIPConfig(VISION, TEXT, DECODER, QuantizerConfig(12, 4), projection_dim=20, vision_projection_bias=True)


def build(config=CONFIG, seed=0, **parts):
    """A model of which no bias is zero and no scale one."""
    torch.manual_seed(seed)
    model = QLIP(config, **parts).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def whole():
    """A model that reads pictures and words."""
    tokenizer = TextTokenizer.train(["a photo of a cat.", "a photo of a dog."], 600, context_length=12)
    config = replace(CONFIG, decoder=replace(DECODER, image_size=16, patch_size=4))
    return build(config, image_processor=ImageProcessor(16, 16), text_tokenizer=tokenizer, name="whole")


def pixels(count=2, side=16, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def text_ids(count=3, length=12, seed=0):
    return torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(seed))


# The towers


@pytest.mark.parametrize(
    ("hidden_act", "size"), [*((act, (16, 16)) for act in ACTIVATIONS), ("gelu", (8, 20)), ("gelu", (24, 24))]
)
def test_the_plain_image_tower_is_clips(hidden_act, size):
    """At other sizes too, positions interpolated; but for CLIP's LayerNorm on the embeddings, which QLIP lacks,
    and the patches' bias, which CLIP lacks.
    """
    vision = ImageTowerConfig(32, 40, 2, 4, hidden_act, image_size=16, patch_size=4)
    ours = build(replace(CONFIG, vision=vision)).vision_model
    theirs = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
            hidden_act=hidden_act,
        )
    ).eval()
    theirs.pre_layrnorm = torch.nn.Identity()
    theirs.embeddings.patch_embedding.bias = torch.nn.Parameter(torch.zeros(32))
    theirs.load_state_dict({key: ours.state_dict()[key] for key in theirs.state_dict()})
    with torch.no_grad():
        pixel_values = torch.randn(2, 3, *size)
        expected, hidden = theirs(pixel_values, interpolate_pos_encoding=True), ours(pixel_values)
        torch.testing.assert_close(hidden, expected.last_hidden_state, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.post_layernorm(hidden[:, 0]), expected.pooler_output, rtol=0, atol=1e-5)


def clip_text(model, eos_token_id, hidden_act="gelu"):
    """CLIP's text tower with the weights of ours."""
    text = model.config.text
    theirs = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            projection_dim=model.config.projection_dim,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            max_position_embeddings=text.max_position_embeddings,
            hidden_act=hidden_act,
            bos_token_id=0,
            eos_token_id=eos_token_id,
        )
    ).eval()
    theirs.load_state_dict({key: model.state_dict()[key] for key in theirs.state_dict()})
    return theirs


@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
@pytest.mark.parametrize("eos_token_id", [2, 50])
def test_the_text_tower_is_clips(eos_token_id, hidden_act):
    model = build(replace(CONFIG, text=replace(TEXT, eos_token_id=eos_token_id, hidden_act=hidden_act)))
    ids, lengths = text_ids() % 50, torch.tensor([4, 9, 12])
    ids[torch.arange(3), lengths - 1] = 50
    mask = (torch.arange(12) < lengths[:, None]).long()
    theirs = clip_text(model, eos_token_id, hidden_act)
    with torch.no_grad():
        for attention_mask in (None, mask):
            expected = F.normalize(theirs(ids, attention_mask).text_embeds, dim=-1)
            actual = model.encode_text(ids, attention_mask)
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("eos_token_id", "position"), [(2, 7), (40, 3), (41, 5)])
def test_pooling_at_the_largest_id_or_at_the_first_end_token(eos_token_id, position):
    model = build(replace(CONFIG, text=replace(TEXT, eos_token_id=eos_token_id)))
    ids = torch.tensor([[1, 7, 8, 40, 40, 41, 2, 99, 41, 99]])
    states = []
    model.text_model.final_layer_norm.register_forward_hook(lambda *arguments: states.append(arguments[-1]))
    with torch.no_grad():
        pooled = model.text_model(ids)
    assert torch.equal(pooled, states[0][:, position])


@pytest.fixture(scope="module", params=[False, True], ids=["learned", "rope"])
def text_model(request):
    return build(replace(CONFIG, text=replace(TEXT, eos_token_id=95, rope=request.param)))


def test_right_padding_changes_nothing(text_model):
    ids, lengths = text_ids(), [5, 12, 8]
    for row, length in enumerate(lengths):
        ids[row, length - 1 :] = 95
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        batch = text_model.encode_text(ids, mask)
        torch.testing.assert_close(text_model.encode_text(ids), batch, rtol=0, atol=1e-6)
        torch.testing.assert_close(text_model.encode_text(ids, mask.bool()), batch, rtol=0, atol=1e-6)
        for row, length in enumerate(lengths):
            alone = text_model.encode_text(ids[row : row + 1, :length])
            torch.testing.assert_close(alone[0], batch[row], rtol=0, atol=1e-6)


def test_left_padding_is_not_seen_and_gives_no_nan(text_model):
    ids = text_ids()
    ids[:, -1] = 95
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, :11] = 0, 0
    other = torch.where(mask == 1, ids, 1)
    with torch.no_grad():
        embeds = text_model.encode_text(ids, mask)
        assert torch.isfinite(embeds).all()
        assert torch.equal(text_model.encode_text(other, mask), embeds)
        assert torch.isfinite(text_model.encode_text(ids, torch.zeros_like(ids))).all()


def test_the_text_tower_is_causal(text_model):
    ids = text_ids()
    ids[:, 6] = 95
    changed = torch.cat((ids[:, :7], text_ids(3, 5, seed=1)), dim=1)
    with torch.no_grad():
        torch.testing.assert_close(text_model.encode_text(ids), text_model.encode_text(changed), rtol=0, atol=1e-6)


def test_unpatchify_order_is_channel_row_column(model):
    patches = []
    handle = model.vision_decoder.conv_out.register_forward_hook(lambda *arguments: patches.append(arguments[-1]))
    with torch.no_grad():
        image = model.decode(model.quantize(model.encode(pixels())))
    handle.remove()
    grid, p = 4, 6
    assert image.shape == (2, 3, grid * p, grid * p)
    for n in range(grid**2):
        row, column = divmod(n, grid)
        for c in range(3):
            for i in range(p):
                expected = patches[0][:, n, c * p * p + i * p : c * p * p + (i + 1) * p]
                assert torch.equal(image[:, c, row * p + i, column * p : (column + 1) * p], expected)


# The contract


def test_forward_shapes(model):
    output = model(pixels(2), text_ids(5))
    shapes = {f.name: tuple(getattr(output, f.name).shape) for f in fields(output)}
    assert shapes == {
        "image_embeds": (2, 20),
        "text_embeds": (5, 20),
        "logits_per_image": (2, 5),
        "latents": (2, 16, 12),
        "codes": (2, 16, 12),
        "reconstructions": (2, 3, 24, 24),
        "features": (2, 16, 32),
        "quantized_features": (2, 16, 24),
    }


def test_forward_is_its_parts(model):
    with torch.no_grad():
        output = model(pixels(), text_ids())
        torch.testing.assert_close(output.latents, model.encode(pixels()))
        torch.testing.assert_close(output.codes, model.quantize(output.latents))
        torch.testing.assert_close(output.reconstructions, model.decode(output.codes))
        torch.testing.assert_close(output.image_embeds, model.encode_image(pixels()))
        torch.testing.assert_close(output.text_embeds, model.encode_text(text_ids()))
    for name in ("latents", "codes", "image_embeds", "text_embeds"):
        norms = getattr(output, name).norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms))


def test_forward_with_pictures_or_words_alone(model):
    without_words, without_pictures = model(pixels()), model(input_ids=text_ids())
    assert without_words.text_embeds is None and without_words.logits_per_image is None
    assert without_words.reconstructions is not None
    present = [f.name for f in fields(without_pictures) if getattr(without_pictures, f.name) is not None]
    assert present == ["text_embeds"]


def test_logit_scale_is_a_logarithm(model):
    fresh = QLIP(replace(CONFIG, logit_scale_init_value=1.5))
    assert fresh.logit_scale.item() == 1.5 and QLIP(CONFIG).logit_scale.item() == pytest.approx(2.6592)
    with torch.no_grad():
        output = model(pixels(), text_ids())
    cosine = output.image_embeds @ output.text_embeds.T
    torch.testing.assert_close(output.logits_per_image, cosine * model.logit_scale.exp())


def test_tokens_there_and_back(model):
    with torch.no_grad():
        codes = model.quantize(model.encode(pixels()))
    tokens = model.codes_to_tokens(codes)
    assert tokens.shape == (2, 16) and tokens.dtype == torch.int64
    assert torch.equal(model.tokens_to_codes(tokens), codes)
    words = model.tokens_to_sub_tokens(tokens, 4)
    assert words.shape == (2, 16, 3) and torch.equal(model.sub_tokens_to_tokens(words, 4), tokens)


def test_every_weight_learns():
    model = build()
    output = model(pixels(), text_ids())
    (output.reconstructions.square().mean() + output.logits_per_image.sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 16, 16), r"pixel_values are \(3, 16, 16\), .* takes \(B, 3, H, W\)"),
        ((2, 1, 16, 16), "takes"),
        ((2, 16, 16, 3), "takes"),
        ((2, 3, 16, 18), "image_size 16 × 18 holds no whole patches: use multiples of 4 pixels"),
        ((2, 3, 0, 16), "image_size 0 × 16"),
    ],
)
def test_pixel_values_of_another_shape(model, shape, message):
    for call in (model, model.encode, model.encode_image):
        with pytest.raises(InputError, match=message):
            call(torch.zeros(shape))


def test_texts_beyond_the_context(model):
    with pytest.raises(InputError, match="13 tokens, the context holds 12"):
        model.encode_text(torch.zeros(2, 13, dtype=torch.int64))
    with pytest.raises(InputError, match=r"input_ids are \(12,\), not \(T, S\)"):
        model.encode_text(torch.zeros(12, dtype=torch.int64))


# Precision


def test_float32_results_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        output = model(pixels(), text_ids())
        embeds = model.encode_image(pixels()), model.encode_text(text_ids()), model.encode(pixels())
    results = (output.latents, output.codes, output.image_embeds, output.text_embeds, output.logits_per_image)
    assert {x.dtype for x in (*results, *embeds)} == {torch.float32}
    with torch.no_grad():
        exact = model(pixels(), text_ids())
    torch.testing.assert_close(output.logits_per_image, exact.logits_per_image, rtol=0, atol=0.5)
    torch.testing.assert_close(output.latents, exact.latents, rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(whole, dtype):
    half = copy.deepcopy(whole).to(dtype)
    output = half(pixels(), text_ids())
    assert {x.dtype for x in (output.latents, output.image_embeds, output.text_embeds)} == {torch.float32}
    assert output.reconstructions.dtype == dtype
    (output.reconstructions.float().mean() + output.logits_per_image.sum()).backward()
    tokens = half.tokenize(pixels().clamp(0, 1))
    assert half.tokens_to_codes(tokens).dtype == dtype
    assert half.detokenize(tokens).dtype == torch.float32
    assert half.classify(pixels().clamp(0, 1), ["cat", "dog"]).dtype == torch.float32
    expected = whole(pixels()).reconstructions
    torch.testing.assert_close(half.decode(whole(pixels()).codes).float(), expected, rtol=0, atol=0.3)


# Pictures


def pictures(count, seed=0):
    return torch.randint(256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def same_tokens(model, batch, images):
    """Whether tokens agree where no latent is so near zero that rounding turns its sign."""
    with torch.no_grad():
        latents = model.encode(model.image_processor(images))
    differ = (model.tokens_to_codes(batch) > 0) != (latents > 0)
    return not (differ & (latents.abs() > 1e-5)).any()


def test_tokenize_takes_any_form_of_a_picture(whole, tmp_path):
    tensor = pictures(1)[0]
    image = Image.fromarray(tensor.permute(1, 2, 0).numpy())
    image.save(tmp_path / "a.png")
    expected = whole.tokenize(tensor)
    assert expected.shape == (1, 16) and expected.dtype == torch.int64
    assert expected.min() >= 0 and expected.max() < 2**12
    forms = [image, tmp_path / "a.png", str(tmp_path / "a.png"), tensor / 255, tensor.numpy()]
    for form in forms:
        assert torch.equal(whole.tokenize(form), expected)
        assert torch.equal(whole.tokenize([form]), expected)
    assert same_tokens(whole, whole.tokenize(forms), forms)
    assert same_tokens(whole, whole.tokenize(pictures(3)), pictures(3))
    assert same_tokens(whole, whole.tokenize(pictures(3) / 255), pictures(3))


def test_tokenize_is_encode_and_quantize(whole):
    with torch.no_grad():
        codes = whole.quantize(whole.encode(whole.image_processor(pictures(3))))
    assert torch.equal(whole.tokenize(pictures(3)), whole.codes_to_tokens(codes))


def test_results_can_be_trained_on(whole):
    """Tensors of `torch.inference_mode` could not."""
    tokens = whole.tokenize(pictures(2))
    weight = torch.ones(2**12, 4, requires_grad=True)
    (F.embedding(tokens, weight).sum() + whole.detokenize(tokens).mean() * weight.sum()).backward()
    (whole.embed_labels(["cat"]) @ torch.ones(20, 1, requires_grad=True)).sum().backward()
    assert weight.grad.abs().sum() > 0 and all(p.grad is None for p in whole.parameters())


def test_many_pictures_go_in_batches(whole):
    images = pictures(qlip.model.qlip.BATCH_SIZE + 6)
    tokens = whole.tokenize(images)
    assert len(tokens) == 70
    for image, row in zip(images, tokens, strict=True):
        assert same_tokens(whole, row[None], image)
    rebuilt = whole.detokenize(tokens)
    one_by_one = torch.cat([whole.detokenize(row) for row in tokens])
    torch.testing.assert_close(rebuilt, one_by_one, rtol=0, atol=1e-5)
    labels = [f"cat {i}" for i in range(70)]
    shares = torch.cat([whole.classify(image, labels) for image in images])
    torch.testing.assert_close(whole.classify(images, labels), shares, rtol=0, atol=1e-5)


def test_detokenize_gives_pictures(whole):
    tokens = whole.tokenize(pictures(2))
    rebuilt = whole.detokenize(tokens)
    assert rebuilt.shape == (2, 3, 16, 16) and rebuilt.dtype == torch.float32
    assert rebuilt.min() >= 0 and rebuilt.max() <= 1
    with torch.no_grad():
        values = whole.decode(whole.tokens_to_codes(tokens))
    std, mean = (torch.tensor(x)[:, None, None] for x in (whole.image_processor.std, whole.image_processor.mean))
    torch.testing.assert_close(rebuilt, (values * std + mean).clamp(0, 1))
    for form in (tokens.numpy().astype(np.uint32), tokens.tolist(), tokens.int()):
        assert torch.equal(whole.detokenize(form), rebuilt)
    torch.testing.assert_close(whole.detokenize(tokens[0]), rebuilt[:1])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 15, dtype=torch.int64), r"tokens are \(2, 15\), but .* 4 × 4 takes \(B, 16\)"),
        (torch.zeros(1, 2, 16, dtype=torch.int64), r"tokens are \(1, 2, 16\)"),
        (torch.tensor(3), r"tokens are \(\)"),
        (torch.full((1, 16), 2**12), r"outside \[0, 2\^12\)"),
        (torch.full((1, 16), -1), "outside"),
        (torch.zeros(1, 16), "not integers"),
    ],
)
def test_tokens_of_another_model(whole, tokens, message):
    with pytest.raises(InputError, match=message):
        whole.detokenize(tokens)


def test_pictures_of_another_size(whole):
    config = whole.config.at_size((24, 12))
    wide = QLIP(config, image_processor=whole.image_processor.at_size(config.size)).eval()
    wide.load_state_dict(whole.state_dict())
    images = torch.rand(2, 3, 50, 30)
    tokens = wide.tokenize(images)
    assert config.grid == (6, 3) and tokens.shape == (2, 18)
    rebuilt = wide.detokenize(tokens)
    assert rebuilt.shape == (2, 3, 24, 12)
    assert torch.equal(whole.detokenize(tokens, grid=(6, 3)), rebuilt)  # the weights are the same
    assert wide.id_hash() == whole.id_hash()
    with pytest.raises(InputError, match=r"\(2, 18\), but a grid of 4 × 4"):
        whole.detokenize(tokens)


def test_positions_learn_from_pictures_of_another_size():
    model = build()
    model(pixels(side=24)).reconstructions.square().mean().backward()
    for positions in (
        model.vision_model.embeddings.position_embedding.weight,
        model.vision_decoder.position_embeddings,
    ):
        assert (positions.grad.abs().sum(-1) > 0).all()


def test_a_picture_that_is_no_square_is_rebuilt_in_place(photos):
    """Tokens in another order would move its parts. Measured: 18 to 25 dB; with the grid transposed 10 to 13."""
    model = qlip.load("qlip-tiny", image_size=(64, 96))
    left, right = (np.asarray(Image.open(photo).convert("RGB").resize((48, 64))) for photo in photos[:2])
    picture = np.concatenate((left, right), axis=1)
    rebuilt = model.detokenize(model.tokenize(picture))[0].permute(1, 2, 0).numpy() * 255
    for part in (np.s_[:, :48], np.s_[:, 48:], np.s_[:32], np.s_[32:]):
        assert 10 * np.log10(255**2 / np.square(rebuilt[part] - picture[part]).mean()) > 16


def test_classify_averages_unit_vectors_over_templates(whole):
    labels, templates = ["cat", "dog", "cat and {dog}"], ["a photo of a {}.", "{}", "two {} or {}"]
    shares = whole.classify(pictures(2), labels, templates)
    assert shares.shape == (2, 3) and shares.dtype == torch.float32
    torch.testing.assert_close(shares.sum(1), torch.ones(2))
    with torch.no_grad():
        text = []
        for label in labels:
            texts = [template.replace("{}", label) for template in templates]
            text.append(F.normalize(whole.encode_text(whole.text_tokenizer(texts)[0]).mean(0), dim=-1))
        image = whole.encode_image(whole.image_processor(pictures(2)))
        logits = whole.logit_scale.exp() * image @ torch.stack(text).T
    torch.testing.assert_close(shares, logits.softmax(-1))
    torch.testing.assert_close(whole.embed_labels(labels, templates), torch.stack(text))
    torch.testing.assert_close(
        whole.classify(pictures(2), labels), whole.classify(pictures(2), labels, ["a photo of a {}."])
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cat",), "labels is 'cat': pass a list of strings"),
        ((np.array("cat"),), "labels is array"),
        ((np.array([["cat"]]),), "labels is array"),
        ((["cat", "dog", "cat"],), "label 'cat' is there twice"),
        ((["cat", " "],), "labels must hold .* none that is blank"),
        ((["cat", 3],), "a text is int, not a string"),
        (([],), "labels must hold at least one string"),
        ((["cat"], []), "templates must hold at least one string"),
        ((["cat"], ["a photo"]), "template 'a photo' has no {}"),
    ],
)
def test_words_that_cannot_be_used(whole, arguments, message):
    with pytest.raises(InputError, match=message):
        whole.classify(pictures(1), *arguments)


def test_no_pictures(whole):
    for call in (whole.tokenize, lambda images: whole.classify(images, ["cat"])):
        with pytest.raises(InputError, match="images is empty"):
            call([])


def test_a_model_without_processor_or_vocabulary_says_so(whole):
    bare = QLIP(whole.config, name="bare", text_tokenizer=whole.text_tokenizer)
    for call in (bare.tokenize, lambda images: bare.classify(images, ["cat"])):
        with pytest.raises(InputError, match="bare has no preprocessor_config"):
            call(pictures(1))
    with pytest.raises(InputError, match="bare has no preprocessor_config"):
        bare.detokenize(torch.zeros(1, 16, dtype=torch.int64))
    mute = QLIP(whole.config, name="mute", image_processor=whole.image_processor)
    assert mute.tokenize(pictures(1)).shape == (1, 16)
    with pytest.raises(InputError, match="mute has no text vocabulary"):
        mute.classify(pictures(1), ["cat"])


# The name of the ids

MAKERS = ["vision_model.embeddings.", "vision_model.encoder.", "vision_model.quant_embed."]


def test_the_hash_names_what_makes_the_ids():
    model = build()
    name = model.id_hash()
    assert len(name) == 16 and int(name, 16) >= 0 and build().id_hash() == name
    for key, parameter in model.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 0.5
            makes_ids = any(key.startswith(maker) for maker in MAKERS)
            assert (model.id_hash() != name) == makes_ids, key
            parameter.copy_(before)
    assert model.id_hash() == name


def test_the_hash_knows_settings_that_no_weight_shows():
    name = build().id_hash()
    eps = replace(CONFIG, vision=replace(VISION, layer_norm_eps=1e-5))
    heads = replace(CONFIG, vision=replace(VISION, num_attention_heads=4))
    rope = replace(CONFIG, vision=replace(VISION, rope=False))
    assert len({name, *(build(config).id_hash() for config in (eps, heads, rope))}) == 4
    decoder = replace(CONFIG, decoder=replace(DECODER, rope=False))
    text = replace(CONFIG, text=replace(TEXT, rope=True))
    assert build(decoder).id_hash() == build(text).id_hash() == name
    assert build(replace(CONFIG, quantizer=QuantizerConfig(12, 6, 50.0))).id_hash() == name


def test_labels_of_any_iterable(whole):
    expected = whole.classify(pictures(2), ["cat", "dog"])
    for labels in (np.array(["cat", "dog"]), (name for name in ("cat", "dog")), {"cat": 1, "dog": 2}.keys()):
        assert torch.equal(whole.classify(pictures(2), labels), expected)


def test_what_users_of_other_libraries_try_gets_an_answer():
    model = qlip.load("qlip-tiny")
    with pytest.raises(InputError, match="templates is 'a photo of {}': pass a list of strings"):
        model.classify("cat.jpg", ["cat"], templates="a photo of {}")
    with pytest.raises(InputError, match="a template is a function"):
        model.embed_labels(["cat"], templates=[lambda name: f"a {name}"])
    for given in (["a cat"], model.text_tokenizer(["a cat"])):
        with pytest.raises(InputError, match=r"not a tensor: pass model.text_tokenizer\(texts\)\[0\]"):
            model.encode_text(given)
    with pytest.raises(InputError, match="pass model.image_processor"):
        model.encode_image(["cat.jpg"])
