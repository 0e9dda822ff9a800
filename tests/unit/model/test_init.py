"""`init_from`: what it loads, how it resizes, what it refuses. EVA-CLIP's own numbers are in tests/golden."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection

from qlip.errors import InputError
from qlip.model import QLIP, ImageTowerConfig, QLIPConfig, QuantizerConfig, TextConfig, init_from
from qlip.model.hub import conversion
from qlip.model.init import InitReport, _resize_kernels, _resize_output

EVA = {"rope": True, "swiglu": True, "subln": True, "k_bias": False, "layer_norm_eps": 1e-6}
VISION = ImageTowerConfig(32, 40, 2, 2, image_size=32, patch_size=8, **EVA)
DECODER = ImageTowerConfig(24, 36, 1, 2, image_size=32, patch_size=8, **EVA)
TEXT = TextConfig(24, 48, 2, 3, vocab_size=99, max_position_embeddings=12, eos_token_id=2)
CONFIG = QLIPConfig(VISION, TEXT, DECODER, QuantizerConfig(12, 4), projection_dim=20, vision_projection_bias=True)

PATCHES = "vision_model.embeddings.patch_embedding.weight"
POSITIONS = "vision_model.embeddings.position_embedding.weight"
DECODER_POSITIONS = "vision_decoder.position_embeddings"
TEXT_POSITIONS = "text_model.embeddings.position_embedding.weight"
INNER_LN = "vision_model.encoder.layers.*.self_attn.inner_attn_ln"


def at(image_size, patch_size, config=CONFIG, **changes):
    """The config of another grid and patch."""
    vision, decoder = (
        replace(tower, image_size=image_size, patch_size=patch_size) for tower in (config.vision, config.decoder)
    )
    return replace(config, vision=vision, decoder=decoder, **changes)


def build(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    model = QLIP(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def saved(tensors, path):
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path)
    return path


def weights(model):
    return {key: weight.clone() for key, weight in model.state_dict().items()}


@pytest.fixture
def tokenizer_file(tmp_path):
    return saved(build(seed=1).state_dict(), tmp_path / "model.safetensors")


def eva_vision(model):
    """An image tower in EVA's layout, written by hand."""
    tower, ours = model.vision_model, {}
    ours["cls_token"] = tower.embeddings.class_embedding[None, None]
    ours["pos_embed"] = tower.embeddings.position_embedding.weight[None]
    ours["patch_embed.proj.weight"] = tower.embeddings.patch_embedding.weight
    ours["patch_embed.proj.bias"] = tower.embeddings.patch_embedding.bias
    ours["norm.weight"], ours["norm.bias"] = tower.post_layernorm.weight, tower.post_layernorm.bias
    for i, layer in enumerate(tower.encoder.layers):
        block, attention = f"blocks.{i}", layer.self_attn
        ours[f"{block}.attn.q_bias"], ours[f"{block}.attn.v_bias"] = attention.q_proj.bias, attention.v_proj.bias
        for name in ("q_proj", "k_proj", "v_proj"):
            ours[f"{block}.attn.{name}.weight"] = getattr(attention, name).weight
        named = {
            "norm1": layer.layer_norm1,
            "norm2": layer.layer_norm2,
            "attn.proj": attention.out_proj,
            "attn.inner_attn_ln": attention.inner_attn_ln,
            **{f"mlp.{name}": getattr(layer.mlp, name) for name in ("w1", "w2", "w3", "ffn_ln")},
        }
        for name, module in named.items():
            ours[f"{block}.{name}.weight"], ours[f"{block}.{name}.bias"] = module.weight, module.bias
        ours[f"{block}.attn.rope.freqs_cos"] = torch.zeros(16, 16)
    return {key: tensor.detach() for key, tensor in ours.items()}


# EVA-02 masked image modelling


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.model."])
def test_mim_loads_the_vision_encoder_and_starts_inner_attn_ln_fresh(prefix, tmp_path):
    source, model = build(seed=1), build()
    before = weights(model)
    tensors = {key: t for key, t in eva_vision(source).items() if "inner_attn_ln" not in key}
    tensors |= {"mask_token": torch.zeros(1, 1, 32), "lm_head.weight": torch.zeros(9, 32)}
    path = saved({prefix + key: tensor for key, tensor in tensors.items()}, tmp_path / "mim.safetensors")
    report = init_from(model, path, "eva-mim")
    for key, weight in model.state_dict().items():
        tower = key.startswith("vision_model.") and "quant_embed" not in key
        loaded = tower and "inner_attn_ln" not in key
        assert torch.equal(weight, (source.state_dict() if loaded else before)[key]), key
        assert (key in report.loaded) == loaded and (key in report.fresh) == (not loaded)
    assert report.resized == ()
    assert set(report.unused) == {f"{prefix}mask_token", f"{prefix}lm_head.weight"}
    assert f"{INNER_LN}.weight (2)" in str(report) and f"{INNER_LN}.bias (2)" in str(report)


def test_mim_of_patch_14_fits_patch_16(tmp_path):
    source = build(at(28, 7), seed=1)
    path = saved(eva_vision(source), tmp_path / "mim.safetensors")
    model = build(at(32, 8))
    report = init_from(model, path, "eva-mim")
    assert report.resized == (PATCHES,)
    small = torch.randn(1, 3, 28, 28)
    patches = F.unfold(small, 7, stride=7).transpose(1, 2).reshape(-1, 3, 7, 7)
    large = F.interpolate(patches, size=8, mode="bicubic", antialias=True)
    with torch.no_grad():
        ours = model.vision_model.embeddings.patch_embedding(large).flatten(1)
        theirs = source.vision_model.embeddings.patch_embedding(patches).flatten(1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# CLIP's text towers


def clip(**text):
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    ids = {"vocab_size": 99, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 2}
    vision = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    text = sizes | ids | {"hidden_act": "gelu", "projection_dim": 20} | text
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)).eval()


def test_clips_text_tower(tmp_path):
    theirs, ids = clip(), torch.randint(3, 90, (3, 12))
    tensors = theirs.state_dict() | {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    path = saved(tensors, tmp_path / "clip.safetensors")
    model = build()
    before = weights(model)
    report = init_from(model, path, "clip-text")
    with torch.no_grad():
        expected = F.normalize(theirs.get_text_features(ids).pooler_output, dim=-1)
        torch.testing.assert_close(model.encode_text(ids), expected, rtol=0, atol=1e-6)
    assert set(report.loaded) == {key for key in before if key.startswith(("text_model.", "text_projection."))}
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in report.fresh)
    assert "logit_scale" in report.fresh and "logit_scale" in report.unused
    assert all(key.startswith(("vision_model.", "visual_projection.", "logit_scale")) for key in report.unused)


def test_a_folder_that_transformers_wrote_and_a_shorter_context(tmp_path):
    theirs = CLIPTextModelWithProjection(clip().config.text_config).eval()
    theirs.save_pretrained(tmp_path)
    model = build(replace(CONFIG, text=replace(TEXT, max_position_embeddings=7)))
    report = init_from(model, tmp_path, "clip-text")
    assert report.resized == (TEXT_POSITIONS,) and report.unused == ()
    ids = torch.randint(3, 90, (3, 7))
    with torch.no_grad():
        expected = F.normalize(theirs(ids).text_embeds, dim=-1)
        torch.testing.assert_close(model.encode_text(ids), expected, rtol=0, atol=1e-6)


# Another QLIP


def test_the_same_qlip_is_copied(tokenizer_file):
    model, source = build(), build(seed=1)
    report = init_from(model, tokenizer_file.parent, "qlip")
    assert all(torch.equal(w, source.state_dict()[key]) for key, w in model.state_dict().items())
    assert set(report.loaded) == model.state_dict().keys()
    assert report.resized == report.fresh == report.unused == ()
    assert model.id_hash() == source.id_hash()


@pytest.mark.parametrize(("image_size", "patch_size"), [(48, 8), (24, 8), (64, 16), (32, 4), (16, 8), (8, 8)])
def test_another_grid_or_patch_is_resized(image_size, patch_size, tokenizer_file):
    model, source = build(at(image_size, patch_size)), load_file(tokenizer_file)
    report = init_from(model, tokenizer_file, "qlip")
    grid, weights = image_size // patch_size, model.state_dict()
    table, decoder = source[POSITIONS], source[DECODER_POSITIONS][0]
    assert torch.equal(weights[POSITIONS][0], table[0])
    for actual, expected in ((weights[POSITIONS][1:], table[1:]), (weights[DECODER_POSITIONS][0], decoder)):
        if grid != 4:
            square = expected.view(1, 4, 4, -1).permute(0, 3, 1, 2)
            square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
            expected = square.permute(0, 2, 3, 1).reshape(grid**2, -1)
        torch.testing.assert_close(actual, expected)
    patch = (
        {PATCHES, "vision_decoder.conv_out.weight", "vision_decoder.conv_out.bias"} if patch_size != 8 else set()
    )
    assert set(report.resized) == ({POSITIONS, DECODER_POSITIONS} if grid != 4 else set()) | patch
    assert report.fresh == report.unused == ()
    assert torch.isfinite(model(torch.randn(1, 3, image_size, image_size)).reconstructions).all()


@pytest.mark.parametrize(("old", "new"), [(14, 16), (7, 8), (8, 16), (8, 8)])
def test_larger_patches_keep_their_embedding(old, new):
    kernels, patches = torch.randn(5, 3, old, old), torch.randn(9, 3, old, old)
    larger = F.interpolate(patches, size=new, mode="bicubic", antialias=True)
    expected = F.conv2d(patches, kernels)
    actual = F.conv2d(larger, _resize_kernels(kernels, new))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("old", "new"), [(16, 14), (14, 8), (16, 8)])
def test_smaller_patches_keep_it_where_nothing_is_lost(old, new):
    """A smooth patch has no detail that shrinking takes away."""
    kernels = F.interpolate(torch.randn(5, 3, 4, 4), size=old, mode="bicubic")
    patches = F.interpolate(torch.randn(9, 3, 3, 3), size=old, mode="bicubic")
    smaller = F.interpolate(patches, size=new, mode="bicubic", antialias=True)
    expected = F.conv2d(patches, kernels).flatten()
    actual = F.conv2d(smaller, _resize_kernels(kernels, new)).flatten()
    plain = F.conv2d(smaller, F.interpolate(kernels, size=new, mode="bicubic")).flatten()
    assert (actual - expected).norm() < 0.1 * expected.norm() < (plain - expected).norm()


@pytest.mark.parametrize(("old", "new"), [(8, 16), (16, 8), (14, 16)])
def test_a_resized_output_draws_resized_patches(old, new):
    weight, bias, x = torch.randn(3 * old**2, 6), torch.randn(3 * old**2), torch.randn(4, 6)
    patches = F.linear(x, weight, bias).view(4, 3, old, old)
    expected = F.interpolate(patches, size=new, mode="bicubic", antialias=True).flatten(1)
    resized = (_resize_output(tensor, 3 * new**2, 3) for tensor in (weight, bias))
    torch.testing.assert_close(F.linear(x, *resized), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_either_side(dtype, tokenizer_file, tmp_path):
    source = {key: tensor.to(dtype) for key, tensor in load_file(tokenizer_file).items()}
    half, full = build(at(48, 12)).to(dtype), build(at(48, 12))
    init_from(full, saved(source, tmp_path / "half.safetensors"), "qlip")
    init_from(half, tokenizer_file, "qlip")
    assert half.dtype == dtype and full.dtype == torch.float32
    for key, weight in full.state_dict().items():
        torch.testing.assert_close(weight, half.state_dict()[key].float(), rtol=0.02, atol=0.02)


# What the report says


def test_switches_that_differ_are_reported(tokenizer_file):
    vision = replace(VISION, subln=False, q_bias=False, k_bias=True)
    model = build(replace(CONFIG, vision=vision, text_projection_bias=True, vision_projection_bias=False))
    report = init_from(model, tokenizer_file, "qlip")
    k_bias = [f"vision_model.encoder.layers.{i}.self_attn.k_proj.bias" for i in range(2)]
    assert set(report.fresh) == {*k_bias, "text_projection.bias"}
    assert "visual_projection.bias" in report.unused
    assert f"  {INNER_LN}.weight (2)\n" in str(report) and "  text_projection.bias\n" in str(report)


def test_a_dropped_bias_names_the_switch():
    report = InitReport(loaded=("a",), resized=(), fresh=(), unused=("visual.head.bias",))
    assert "visual.head.bias was dropped: set vision_projection_bias=True" in str(report)


def test_the_report_groups_layers_and_whole_parts():
    fresh = ("a.layers.0.w", "a.layers.1.w", "b.x", "b.y.z", "a.q.w", "a.q.b", "scale", "c.w")
    report = InitReport(loaded=("a.layers.0.v", "d"), resized=("p",), fresh=fresh, unused=())
    assert str(report).splitlines() == [
        "loaded 2 tensors as they are",
        "resized:",
        "  p",
        "fresh:",
        "  a.layers.*.w (2)",
        "  b.* (2)",
        "  a.q.* (2)",
        "  scale",
        "  c.w",
    ]


def test_a_long_list_is_cut():
    report = InitReport((), (), (), tuple(f"key_{i}" for i in range(20)))
    assert len(str(report).splitlines()) == 15 and str(report).endswith("  and 8 more")


# What is refused


def refused(model, path, source, message):
    """The error, of one line, that leaves the model as it was."""
    before = weights(model)
    with pytest.raises(InputError, match=message) as error:
        init_from(model, path, source)
    assert "\n" not in str(error.value)
    assert all(torch.equal(w, before[key]) for key, w in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            replace(CONFIG, vision=replace(VISION, hidden_size=48, num_attention_heads=3)),
            r"class_embedding \(32,\), but the model's is \(48,\)",
        ),
        (
            replace(CONFIG, vision=replace(VISION, intermediate_size=44)),
            r"layers.0.mlp.w1.weight \(40, 32\), but the model's is \(44, 32\)",
        ),
        (
            replace(CONFIG, vision=replace(VISION, num_hidden_layers=3)),
            "has 2 layers in vision_model.* model has 3",
        ),
        (replace(CONFIG, text=replace(TEXT, num_hidden_layers=1)), "has 2 layers in text_model.* the model has 1"),
        (replace(CONFIG, vision=replace(VISION, swiglu=False)), r"has nothing for the model's \S+mlp.fc1.weight"),
        (replace(CONFIG, text=replace(TEXT, vocab_size=100)), r"token_embedding.* \(99, 24\), .* \(100, 24\)"),
        (
            replace(CONFIG, text=replace(TEXT, max_position_embeddings=13)),
            r"position_embedding.weight \(12, 24\), but the model's is \(13, 24\)",
        ),
        (replace(CONFIG, projection_dim=21), r"projection.weight \(20, \d+\), but the model's is \(21, \d+\)"),
        (replace(CONFIG, quantizer=QuantizerConfig(28)), r"quant_embed.c_proj.weight \(12, 32\), .* \(28, 32\)"),
        (
            at(48, 12, replace(CONFIG, decoder=replace(DECODER, intermediate_size=37))),
            r"vision_decoder\S+ \(36, 24\), but the model's is \(37, 24\)",
        ),
    ],
)
def test_another_width_or_depth(config, message, tokenizer_file):
    refused(build(config), tokenizer_file, "qlip", message)


def test_another_layout(tokenizer_file, tmp_path):
    refused(build(), tokenizer_file, "eva-clip", "no 'visual.cls_token': pass source='clip-text' or 'qlip'$")
    mim = saved(eva_vision(build()), tmp_path / "mim.safetensors")
    refused(build(), mim, "qlip", "pass source='eva-mim'$")
    strange = saved({"a": torch.zeros(1)}, tmp_path / "strange.safetensors")
    refused(build(), strange, "eva-mim", "it has 'a' and the like but no 'cls_token': check the path")
    empty = saved({}, tmp_path / "empty.safetensors")
    refused(build(), empty, "clip-text", "it has 'nothing'")
    refused(build(), tokenizer_file, "clip", "source is 'clip': use one of eva-clip, eva-mim, clip-text, qlip")


@pytest.mark.parametrize("key", ["pos_embed", "patch_embed.proj.weight", "cls_token", "blocks.0.attn.proj.weight"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (1, 0, 32), (1, 12, 32), (32, 3, 7, 8), (32, 1, 7, 7)])
def test_a_strange_shape_is_a_mismatch(key, shape, tmp_path):
    tensors = eva_vision(build()) | {key: torch.zeros(shape)}
    refused(build(), saved(tensors, tmp_path / "mim.safetensors"), "eva-mim", "but the model's is")


def test_files_that_cannot_be_read(tmp_path, tokenizer_file):
    refused(
        build(), tmp_path / "none.safetensors", "qlip", "none.safetensors' is missing: pass a safetensors file"
    )
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not safetensors")
    refused(build(), broken, "qlip", "broken.safetensors' is not a readable safetensors file")
    refused(build(), tmp_path, "qlip", r"several safetensors files \(broken.safetensors, model.safetensors\)")
    (tmp_path / "bare").mkdir()
    refused(build(), tmp_path / "bare", "qlip", "model.safetensors' is missing")


@pytest.mark.parametrize("nesting", [None, "model", "module", "state_dict", "model_state_dict", "ddp"])
def test_a_pickle_is_refused_with_the_line_that_converts_it(nesting, tmp_path):
    (tmp_path / "eva").mkdir()
    source = build(seed=1)
    rope = torch.zeros(16, 16)  # EVA's tables share their memory
    tensors = eva_vision(source) | {"rope.freqs_cos": rope, "blocks.0.attn.rope.freqs_cos": rope}
    if nesting == "ddp":
        saved = {"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}
    else:
        saved = {nesting: tensors, "epoch": 3} if nesting else tensors
    torch.save(saved, tmp_path / "eva" / "eva.pt")
    model = build()
    for path in (tmp_path / "eva" / "eva.pt", tmp_path / "eva"):
        refused(
            model, path, "eva-mim", r"eva.pt' is a pickle: loading a pickle can run any code.* weights_only=True"
        )
    with pytest.raises(InputError) as error:
        init_from(model, tmp_path / "eva", "eva-mim")
    code = str(error.value).split("convert it once with ")[1]
    exec(code)
    report = init_from(model, tmp_path / "eva", "eva-mim")
    assert report.unused == ()
    assert torch.equal(model.state_dict()[PATCHES], source.state_dict()[PATCHES])


def test_a_pickle_without_tensors_is_not_converted(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(AssertionError, match="no tensors found"):
        exec(conversion(str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors")).split("convert it once with ")[1])
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(("name", "value"), (("hidden_act", "quick_gelu"), ("layer_norm_eps", 1e-3)))
def test_clips_settings_that_no_tensor_tells_are_compared(tmp_path, name, value):
    CLIPTextModelWithProjection(clip(**{name: value}).config.text_config).save_pretrained(tmp_path)
    option = f"--model.text.{name.replace('_', '-')} {value}"
    refused(build(), tmp_path, "clip-text", f"{name} {value!r}, this model's has .*: pass {option}")
