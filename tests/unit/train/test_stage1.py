import copy
import dataclasses
import json
import math

import pytest
import torch

from qlip.data.teacher import Teacher
from qlip.errors import InputError
from qlip.model.quantizer import quantizer_loss
from qlip.train.balance import Balance, loss_limit, ratio
from qlip.train.losses import contrastive_loss
from qlip.train.parallel import ComputeConfig
from qlip.train.stage1 import Stage1, Stage1Config
from qlip.train.task import NonFinite

CPU = ComputeConfig(device="cpu", precision="bf16")
FP32 = ComputeConfig(device="cpu", precision="fp32")


def batch(model, size=8):
    torch.manual_seed(1)
    captions = [("red square", "blue square")[i % 2] for i in range(size)]
    input_ids, mask = model.text_tokenizer(captions)
    colors = torch.tensor([[1.5, -1.0, -1.0], [-1.0, -1.0, 1.5]])[torch.arange(size) % 2]
    return {
        "pixel_values": colors[:, :, None, None] + 0.2 * torch.randn(size, 3, 32, 32),
        "input_ids": input_ids,
        "attention_mask": mask,
        "group": torch.arange(size) % 2,
        "keys": [""] * size,
    }


@pytest.mark.parametrize("pixel_scale", ("unit", "normalized"))
def test_the_loss_is_the_papers_weighted_sum(small_model, pixel_scale):
    config = Stage1Config(
        reconstruction_weight=7.0,
        alignment_weight=3.0,
        quantizer_weight=2.0,
        commitment_weight=0.5,
        pixel_scale=pixel_scale,
    )
    data = batch(small_model)
    std = torch.tensor(small_model.image_processor.std) if pixel_scale == "unit" else torch.ones(3)
    with torch.autocast("cpu", torch.bfloat16):
        out = small_model(data["pixel_values"], data["input_ids"])
    scale = small_model.logit_scale.exp()
    pixels = [x * std[:, None, None] for x in (out.reconstructions.float(), data["pixel_values"])]
    z, z_hat = out.features.float(), out.quantized_features.float()
    expected = (
        7 * (pixels[0] - pixels[1]).pow(2).mean()
        + 3 * contrastive_loss(out.image_embeds, out.text_embeds, scale, data["group"])
        + 2 * quantizer_loss(out.latents, small_model.config.quantizer)
        + 0.5 * (z - z_hat).pow(2).mean()
    ).detach()
    values = Stage1(small_model, config, CPU, 8).step(data, 1)
    torch.testing.assert_close(values["loss"], expected, rtol=1e-5, atol=1e-5)


def test_it_learns_to_rebuild_and_to_align(small_model):
    task = Stage1(small_model.train(), Stage1Config(lr=2e-3), CPU, 8)
    data = batch(small_model)
    first = task.step(data, 1)
    for step in range(2, 62):
        last = task.step(data, step)
    assert last["reconstruction"] < first["reconstruction"] / 3
    assert last["alignment"] < first["alignment"] - 0.3  # towards ln 4, its floor with four of each caption
    assert last["alignment"] >= math.log(4) - 1e-3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small_model.parameters())


def test_it_learns_to_align_by_the_sigmoid_loss(small_model):
    before = set(small_model.state_dict())
    task = Stage1(small_model.train(), Stage1Config(contrastive="sigmoid", optimizer="muon", lr=5e-3), CPU, 8)
    assert small_model.logit_scale.item() == pytest.approx(math.log(10))
    data = batch(small_model)
    first = task.step(data, 1)
    for step in range(2, 16):
        last = task.step(data, step)
    assert first["alignment"] > 8  # half of the 64 pairs are positives, with logits near −10
    assert last["alignment"] < first["alignment"] / 2
    assert last["reconstruction"] < first["reconstruction"] / 3
    assert last["logit_scale"] > first["logit_scale"] and last["logit_bias"] > first["logit_bias"] > -10.01
    assert set(task.snapshot().state_dict()) == before


def test_a_run_with_bias_and_muon_goes_on_exactly(small_model):
    config, twin = Stage1Config(contrastive="sigmoid", optimizer="muon"), copy.deepcopy(small_model)
    task, data = Stage1(small_model, config, FP32, 8), batch(small_model)
    task.step(data, 1)
    resumed = Stage1(twin, config, FP32, 8)
    saved = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    assert {"extra.logit_bias", "optimizer.logit_bias.exp_avg"} < saved.keys()
    for name, tensor in resumed.state_dict().items():
        tensor.copy_(saved[name])
    values = [each.step(data, 2) for each in (task, resumed)]
    assert values[0] == values[1]
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in task.state_dict().items())


TEACHER = Teacher("teacher", "", (64, 64), width=12, grid=(2, 2), grid_width=6)


def with_teacher(data, known=slice(None)):
    """The teacher sees of an image its colour, and of a cell of the grid the same."""
    torch.manual_seed(2)
    colors = data["pixel_values"].mean((2, 3))
    pooled, grid = torch.zeros(len(colors), 12), torch.zeros(len(colors), 2, 2, 6)
    pooled[known] = (colors @ torch.randn(3, 12))[known]
    grid[known] = (colors @ torch.randn(3, 6))[known][:, None, None]
    return data | {"teacher/pooled": pooled.half(), "teacher/grid": grid.half()}


def teacher_distances(model, shuffled):
    """Mean of the last 5 of 40 steps; shuffled: in each step images have the features of others."""
    config = Stage1Config(lr=2e-3, reconstruction_weight=0.0, quantizer_weight=0.0, commitment_weight=0.0)
    task = Stage1(model.train(), config, FP32, 8, TEACHER)
    last = []
    for step in range(1, 41):
        data = with_teacher(batch(model))
        if shuffled:
            order = torch.randperm(8, generator=torch.Generator().manual_seed(step))
            data |= {name: data[name][order] for name in ("teacher/pooled", "teacher/grid")}
        last.append(task.step(data, step))
    return [sum(float(values[name]) for values in last[-5:]) / 5 for name in ("teacher/pooled", "teacher/grid")]


def test_it_learns_what_the_teacher_sees_and_not_shuffled_features(small_model):
    assert max(teacher_distances(copy.deepcopy(small_model), shuffled=False)) < 0.1
    assert min(teacher_distances(small_model, shuffled=True)) > 0.3


def test_the_teachers_loss_is_the_mean_cosine_distance_of_images_with_features(small_model):
    known = [1, 4, 6]
    data = with_teacher(batch(small_model), known)
    task = Stage1(small_model, Stage1Config(teacher_weight=3.0), FP32, 8, TEACHER)
    with torch.no_grad():
        hidden = small_model.hidden_states(data["pixel_values"])[known]
        pooled = task.extra.heads["pooled"](hidden[:, 0])
        patches = hidden[:, 1:].mT.unflatten(2, (4, 4))
        cells = torch.nn.functional.adaptive_avg_pool2d(patches, (2, 2)).permute(0, 2, 3, 1)
        grid = task.extra.heads["grid"](cells)
    cosine = torch.nn.CosineSimilarity(dim=-1)
    values = task.step(data, 1)
    for name, predicted in (("pooled", pooled), ("grid", grid)):
        expected = (1 - cosine(predicted, data[f"teacher/{name}"][known].float())).mean()
        torch.testing.assert_close(values[f"teacher/{name}"], expected, rtol=1e-4, atol=1e-5)
    plain = values["loss"] - 3 * (values["teacher/pooled"] + values["teacher/grid"])
    without = Stage1(small_model, Stage1Config(lr=1e-12), FP32, 8)
    assert "heads" not in " ".join(without.state_dict()) and plain > 0


def test_without_weight_or_without_a_known_image_nothing_changes(small_model):
    """A weight of 0 is training without a teacher, bit for bit; a batch of unknown images moves no head."""
    data = with_teacher(batch(small_model), [])
    states = []
    for teacher, weight in ((None, 1.0), (TEACHER, 0.0), (TEACHER, 1.0)):
        task = Stage1(copy.deepcopy(small_model), Stage1Config(lr=1e-3, teacher_weight=weight), FP32, 8, teacher)
        heads = copy.deepcopy(task.extra.heads.state_dict())
        values = [task.step(data, step) for step in (1, 2)][-1]
        states.append(task.state_dict() | {"loss": values["loss"]})
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert values["teacher/pooled"] == 0 and values["loss"].isfinite()
    moved = (task.extra.heads.state_dict()[name] - value for name, value in heads.items())
    assert max(float(change.abs().max()) for change in moved) < 1e-3  # the weight decay
    assert "extra.heads.pooled.weight" in task.state_dict() and not any(
        "head" in n for n in task.snapshot().state_dict()
    )


def test_a_teachers_grid_that_does_not_fit_is_refused(small_model):
    fine = dataclasses.replace(TEACHER, grid=(3, 3))
    with pytest.raises(InputError, match="grid of 4 × 4 tokens is no multiple of the teacher's 3 × 3"):
        Stage1(small_model, Stage1Config(), FP32, 8, fine)
    with pytest.raises(InputError, match="teacher_weight is -1.0: it must be 0 or more"):
        Stage1Config(teacher_weight=-1.0)


def test_logit_scale_is_clamped(small_model):
    task = Stage1(small_model, Stage1Config(lr=1e-4), CPU, 8)
    with torch.no_grad():
        small_model.logit_scale.fill_(7.0)
    task.step(batch(small_model), 1)
    assert small_model.logit_scale.item() == pytest.approx(math.log(100))


@pytest.mark.parametrize(
    ("changes", "still", "moving"),
    (
        (
            {"alignment_weight": 0.0},
            ("text_model", "text_projection", "visual_projection", "vision_model.post_layernorm", "logit_scale"),
            ("vision_model.encoder", "vision_model.quant_embed", "vision_decoder"),
        ),
        (
            {"reconstruction_weight": 0.0, "quantizer_weight": 0.0, "commitment_weight": 0.0},
            ("vision_decoder", "vision_model.quant_embed"),
            ("vision_model.encoder", "text_model", "visual_projection", "logit_scale"),
        ),
        (
            {"quantize": False, "quantizer_weight": 0.0, "commitment_weight": 0.0},
            ("vision_model.quant_embed",),
            ("vision_model.encoder", "vision_decoder", "text_model"),
        ),
    ),
    ids=("reconstruction only", "contrast only", "recipe 2"),
)
def test_what_no_loss_trains_does_not_move_bit_for_bit(small_model, changes, still, moving):
    before = {name: p.detach().clone() for name, p in small_model.named_parameters()}
    task = Stage1(small_model, Stage1Config(lr=1e-4, **changes), CPU, 8)
    values = [task.step(batch(small_model), step) for step in (1, 2)]
    moved = {name for name, p in small_model.named_parameters() if not torch.equal(before[name], p)}
    assert not [name for name in moved if name.startswith(still)]
    for prefix in moving:
        assert any(name.startswith(prefix) for name in moved), prefix
    assert values[1]["loss"] < values[0]["loss"]


def test_without_the_quantizer_the_decoder_sees_the_features(small_model):
    config = Stage1Config(quantize=False, quantizer_weight=0.0, commitment_weight=0.0)
    data = batch(small_model)
    with torch.no_grad():
        rebuilt = small_model.vision_decoder(small_model(data["pixel_values"]).features)
    std = torch.tensor(small_model.image_processor.std)[:, None, None]
    expected = ((rebuilt - data["pixel_values"]) * std).square().mean()
    values = Stage1(small_model, config, FP32, 8).step(data, 1)
    torch.testing.assert_close(values["reconstruction"], expected)
    assert "bit_entropy" not in values


def test_every_second_picture_is_rebuilt(small_model):
    data = batch(small_model)
    with torch.no_grad():
        rebuilt = small_model(data["pixel_values"]).reconstructions
    std = torch.tensor(small_model.image_processor.std)[:, None, None]
    errors = ((rebuilt - data["pixel_values"]) * std).square().mean((1, 2, 3))
    values = Stage1(small_model, Stage1Config(reconstruct_every=2), FP32, 8).step(data, 1)
    torch.testing.assert_close(values["reconstruction"], errors[::2].mean())
    with pytest.raises(InputError, match="reconstruct_every 3 does not divide the 8 samples"):
        Stage1(small_model, Stage1Config(reconstruct_every=3), FP32, 8)


def test_gradient_balance_makes_the_gradients_equally_long(small_model):
    """Against PyTorch's own gradient of each loss at the last MLP of the vision encoder."""
    data = batch(small_model)
    out = small_model(data["pixel_values"], data["input_ids"])
    weight = small_model.vision_model.encoder.layers[-1].mlp.w3.weight
    scale, std = small_model.logit_scale.exp(), torch.tensor(small_model.image_processor.std)[:, None, None]
    align = contrastive_loss(out.image_embeds, out.text_embeds, scale, data["group"])
    mse = ((out.reconstructions - data["pixel_values"]) * std).square().mean()
    norms = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (align, mse)]
    task = Stage1(small_model, Stage1Config(balance="gradient", alignment_weight=2.0), FP32, 8)
    values = task.step(data, 1)
    torch.testing.assert_close(values["reconstruction_weight"], 2 * norms[0] / norms[1], rtol=1e-4, atol=0)
    assert values["loss"].item() == pytest.approx(
        2 * align.item()
        + values["reconstruction_weight"].item() * mse.item()
        + (values["quantizer/tokens"] + values["quantizer/codebook"] + values["commitment"]).item(),
        rel=1e-4,
    )
    assert (
        task.step(data, 2)["reconstruction_weight"] == values["reconstruction_weight"]
    )  # measured every 20 steps
    later = task.step(data, 21)["reconstruction_weight"]
    assert later != values["reconstruction_weight"]


def test_balance_smooths_and_passes_over_what_is_not_finite():
    def norms(alignment, reconstruction):
        return {"alignment": torch.tensor(alignment), "reconstruction": torch.tensor(reconstruction)}

    balance = Balance(0.9, torch.device("cpu"))
    balance.update(balance.after(norms(0.0, 0.0)))
    assert not balance.measured()
    balance.update(balance.after(norms(2.0, 0.5)))
    assert ratio(balance.state) == 4
    assert ratio(balance.after(norms(12.0, 0.5))) == pytest.approx(6)
    assert ratio(balance.state) == 4  # a step that fails takes nothing over
    balance.update(balance.after(norms(12.0, 0.5)))
    assert ratio(balance.after(norms(float("nan"), 0.5))) == pytest.approx(6)


def test_calibrated_weights_come_from_the_file(small_model, tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"ratio": 250.0}))
    config = Stage1Config(balance="calibrated", calibration=path, alignment_weight=2.0)
    values = Stage1(small_model, config, FP32, 8).step(batch(small_model), 1)
    terms = values["quantizer/tokens"] + values["quantizer/codebook"] + values["commitment"]
    expected = 500 * values["reconstruction"] + 2 * values["alignment"] + terms
    torch.testing.assert_close(values["loss"], expected)
    path.write_text("{}")
    with pytest.raises(InputError, match="not a calibration.*qlip calibrate"):
        Stage1(small_model, config, FP32, 8)


def test_where_a_run_ends_is_the_mean_of_its_last_tenth():
    points = [(step, 10.0 if step <= 90 else 2.0 + step % 2) for step in range(1, 101)]
    assert loss_limit(points) == pytest.approx(2.5)
    with pytest.raises(InputError, match="train it longer"):
        loss_limit([(1, float("nan"))])


@pytest.mark.parametrize("term", ("pixel_values", "weights"))
def test_a_loss_that_is_not_finite_moves_nothing(small_model, term):
    task = Stage1(small_model, Stage1Config(), FP32, 8)
    data = batch(small_model)
    if term == "pixel_values":
        data["pixel_values"][3, 0, 0, 0] = float("inf")
    else:
        small_model.vision_decoder.conv_out.bias.data[0] = float("nan")
    before = {name: value.clone() for name, value in task.state_dict().items()}
    with pytest.raises(NonFinite) as error:
        task.step(data, 1)
    assert not math.isfinite(error.value.values["reconstruction"])
    for name, value in task.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"reconstruction_weight": 0.0, "alignment_weight": 0.0}, "nothing would be learnt"),
        ({"reconstruction_weight": -1.0}, "reconstruction_weight is -1.0"),
        ({"reconstruction_weight": 0.0}, "set commitment_weight to 0"),
        ({"quantize": False}, "set quantizer_weight and commitment_weight to 0"),
        ({"balance": "calibrated"}, "qlip calibrate"),
        ({"balance": "gradient", "alignment_weight": 0.0}, "neither weight may be 0"),
        ({"balance_smoothing": 1.0}, "balance_smoothing is 1.0"),
        ({"reconstruct_every": 0}, "at least 1"),
        ({"drop_tokens": 1.0, "reconstruct_every": 2}, "drop_tokens is 1.0"),
        ({"drop_tokens": 0.5}, "set reconstruct_every above 1"),
        ({"reconstruct_every": 2, "alignment_weight": 0.0}, "neither weight may be 0"),
        ({"contrastive": "hinge"}, "contrastive is 'hinge': choose softmax or sigmoid"),
    ),
)
def test_combinations_that_cannot_be_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        Stage1Config(**changes)


@pytest.mark.parametrize("size", [(32, 48), (24, 40)])
def test_pictures_of_another_size(small_model, size):
    """The loss is that of the model itself, in parts and recomputed too; the positions learn."""
    data = batch(small_model)
    data["pixel_values"] = torch.nn.functional.interpolate(data["pixel_values"], size)
    with torch.no_grad():
        rebuilt = small_model(data["pixel_values"]).reconstructions
    std = torch.tensor(small_model.image_processor.std)[:, None, None]
    expected = ((rebuilt - data["pixel_values"]) * std).square().mean()
    vision, decoder = small_model.vision_model, small_model.vision_decoder
    learnt = vision.embeddings.position_embedding.weight, decoder.position_embeddings
    before = [positions.detach().clone() for positions in learnt]
    compute = ComputeConfig(device="cpu", precision="fp32", micro_batch_size=4, recompute=True)
    values = Stage1(small_model, Stage1Config(), compute, 8).step(data, 1)
    torch.testing.assert_close(values["reconstruction"], expected)
    assert not any((was == now).all(-1).any() for was, now in zip(before, learnt, strict=True))


def test_dropped_patches_are_those_of_images_that_are_not_reconstructed(small_model):
    """The reconstructed images count as before; the others' embeddings no longer depend on the dropped half."""
    data = batch(small_model)
    plain = Stage1(small_model, Stage1Config(lr=1e-9, reconstruct_every=2), FP32, 8).step(data, 1)
    task = Stage1(small_model, Stage1Config(lr=1e-9, reconstruct_every=2, drop_tokens=0.5), FP32, 8)
    dropped = task.step(data, 1)
    for name in ("reconstruction", "commitment", "quantizer/tokens", "quantizer/codebook"):
        torch.testing.assert_close(dropped[name], plain[name], rtol=1e-4, atol=1e-6)
    assert dropped["alignment"] != plain["alignment"]

    def embeddings(pixels):
        (part,), _ = task._parts(data | {"pixel_values": pixels}, 1)
        with torch.no_grad():
            return task.parallel(part, False).rows["image_embeds"]

    before, changed = embeddings(data["pixel_values"]), []
    rows, columns = small_model.config.grid
    size = small_model.config.vision.patch_size
    for patch in range(rows * columns):
        pixels = data["pixel_values"].clone()
        y, x = divmod(patch, columns)
        pixels[:, :, y * size : (y + 1) * size, x * size : (x + 1) * size] += 1
        changed.append((embeddings(pixels) != before).any(1))
    share = torch.stack(changed).float().mean(0)
    assert share[::2].tolist() == [1.0] * 4 and share[1::2].tolist() == [0.5] * 4


def test_the_order_of_kept_patches_does_not_matter(small_model):
    kept = torch.arange(small_model.config.num_tokens)
    pixels = batch(small_model)["pixel_values"]
    with torch.no_grad():
        assert torch.equal(small_model.hidden_states(pixels, kept), small_model.hidden_states(pixels))
        order = kept.flip(0)
        flipped = small_model.hidden_states(pixels, order)
        torch.testing.assert_close(flipped[:, 1:].flip(1), small_model.hidden_states(pixels)[:, 1:])
