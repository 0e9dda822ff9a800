"""Exported by torch.export, and what every format's programs are checked for."""

import subprocess
import sys

import pytest
import torch

import qlip
from qlip.errors import InputError
from qlip.integrations import torch_export
from qlip.integrations.parts import Agreement, compare, parts, read_export
from qlip.recipes.export import export, open_tokenizer

WITHOUT_US = """
import sys, torch
pixel_values = torch.load(sys.argv[1] + "/pixel_values", weights_only=True)
encoder, decoder = (torch.export.load(f"{sys.argv[1]}/{name}.pt2").module() for name in ("encoder", "decoder"))
with torch.no_grad():
    tokens, latents, image_embeds = encoder(pixel_values)
    torch.save((tokens, decoder(tokens)), sys.argv[1] + "/result")
assert "qlip" not in sys.modules
"""


def test_the_programs_run_without_this_package(run, small_model, tmp_path):
    small_model.save(tmp_path / "small")
    code, _, err = run("export", tmp_path / "small", "--format", "torch-export", "--out", tmp_path)
    assert code == 0 and "1,792 bits agree, but for 0 of the" in err
    pixel_values = torch.randn(5, 3, 32, 32)
    torch.save(pixel_values, tmp_path / "pixel_values")
    subprocess.run([sys.executable, "-c", WITHOUT_US, str(tmp_path)], check=True)
    tokens, images = torch.load(tmp_path / "result", weights_only=True)
    with torch.no_grad():
        assert tokens.equal(small_model.codes_to_tokens(small_model.quantize(small_model.encode(pixel_values))))
    assert (images - small_model.detokenize(tokens)).abs().max() < 1e-6
    assert read_export(tmp_path, "torch-export")["id_hash"] == small_model.id_hash()
    held = torch.export.load(tmp_path / "text.pt2").state_dict
    assert not any("vision" in name for name in held)  # each program has its own weights alone


@pytest.mark.slow
def test_other_models_as_torch_export(other, tmp_path):
    agreement = torch_export.export(other, tmp_path)
    assert max(agreement.errors.values()) < 1e-6 and agreement.num_different == 0


def test_the_command_and_what_it_refuses(run, small_model, tmp_path):
    small_model.save(tmp_path / "small")
    code, _, err = run("export", tmp_path / "small", "--image-size", "16", "--out", tmp_path / "tokenizer")
    assert code == 0 and qlip.load(tmp_path / "tokenizer").config.size == (16, 16)
    code, _, err = run("export", tmp_path / "small", "--checkpoint", "best", "--out", tmp_path / "no")
    assert code == 1 and "is no folder of a training run" in err
    code, _, err = run("export", tmp_path / "small", "--format", "coreml", "--out", tmp_path / "no")
    assert code == 2 and not (tmp_path / "no").exists()
    with pytest.raises(InputError, match="format='coreml': use one of qlip, transformers, onnx, torch-export"):
        export(small_model, tmp_path / "no", "coreml")
    with pytest.raises(InputError, match="'nothing' is not known"):
        open_tokenizer("nothing")


# What is checked


def test_a_bit_may_turn_where_its_latent_is_almost_zero(small_model):
    encoder = parts(small_model)[0]

    def turned(near):
        """A runtime that turns the bit of each picture whose latent is nearest to, or farthest from, zero."""

        def run(pixel_values):
            tokens, latents, image_embeds = encoder.module(pixel_values)
            size = latents.abs().flatten(1)
            place = (size.argmin(1) if near else size.argmax(1)).tolist()
            for row, (token, bit) in enumerate(divmod(p, 28) for p in place):
                tokens[row, token] ^= 1 << (27 - bit)
            return tokens, latents, image_embeds

        return run

    with pytest.raises(InputError, match=r"encoder gives 1 of 448 bits wrong, where latents are as far as 0\.\d"):
        compare(encoder, turned(near=False), Agreement(0, 0, 0, {}))
    with torch.no_grad():
        last = small_model.vision_model.quant_embed.c_proj
        last.weight[0], last.bias[0] = 0, 0
    agreement = Agreement(0, 0, 0, {})
    compare(encoder, turned(near=True), agreement)
    assert (agreement.num_bits, agreement.num_near_zero, agreement.num_different) == (4 * 448, 4 * 16, 4)


@pytest.mark.parametrize("wrong", [0.01, float("nan")])
def test_a_runtime_that_is_wrong_is_refused(small_model, wrong):
    decoder = parts(small_model)[1]
    with pytest.raises(InputError, match=f"the exported decoder gives images that are off by {wrong}, more than"):
        compare(decoder, lambda ids: [decoder.module(ids) + wrong], Agreement(0, 0, 0, {}))


def test_what_cannot_be_exported(small_model, tmp_path):
    with pytest.raises(InputError, match="in torch.bfloat16 on cpu: load it in float32 on the CPU"):
        torch_export.export(small_model.bfloat16(), tmp_path / "no")
    small_model.float().image_processor = None
    with pytest.raises(InputError, match=r"has no preprocessor_config\.json"):
        torch_export.export(small_model, tmp_path / "no")
    assert not (tmp_path / "no").exists()
