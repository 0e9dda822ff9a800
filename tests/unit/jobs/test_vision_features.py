"""Features of images are those of transformers' own forward pass, computed once, resumed, and learnt."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import encoded
from tests.integration.test_training import SMALL

from qlip.data.teacher import TeacherFiles, TeacherWriter
from qlip.errors import InputError
from qlip.jobs.vision_features import compute_vision_features
from qlip.model.image import read_image

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
TOWER = {**SIZES, "image_size": 64, "patch_size": 16}
SMALL_MODELS = {
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "ViT": TOWER,
    "Dinov2WithRegisters": {**TOWER, "num_register_tokens": 2},
    "CLIP": {"vision_config": TOWER, "text_config": {**SIZES, "vocab_size": 99, "eos_token_id": 98}},
}


def save_model(folder, kind):
    """A small random model with its image processor; normalisation has statistics of its own."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**SMALL_MODELS[kind]))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model.save_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}
    )
    processor.save_pretrained(folder)
    return model.eval(), processor


@pytest.fixture
def resnet(tmp_path):
    save_model(tmp_path / "resnet", "ResNet")
    return str(tmp_path / "resnet")


@pytest.mark.parametrize("kind", SMALL_MODELS)
def test_features_are_those_of_transformers(tmp_path, color_data, kind):
    model, processor = save_model(tmp_path / "model", kind)
    out = tmp_path / "teacher.safetensors"
    count, faults = compute_vision_features(
        [str(color_data / "val.parquet")], out, str(tmp_path / "model"), (2, 1), batch_size=6
    )
    assert (count, faults) == (16, [])
    images = [row["bytes"] for row in pq.read_table(color_data / "val.parquet")["image"].to_pylist()]
    pixel_values = processor(images=[read_image(image) for image in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = (model.vision_model if kind == "CLIP" else model)(pixel_values=pixel_values)
    states = output.last_hidden_state
    if states.ndim == 3:
        states = states[:, -16:].mT.reshape(16, -1, 4, 4)
    grid = torch.nn.functional.adaptive_avg_pool2d(states, (2, 1))
    files = TeacherFiles([out])
    for i, image in enumerate(images):
        found = files.find(image)
        expected = output.pooler_output[i].flatten()
        torch.testing.assert_close(found["teacher/pooled"].float(), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found["teacher/grid"].float(), grid[i].permute(1, 2, 0), rtol=1e-3, atol=1e-3)


def test_a_pooler_without_weights_gives_way_to_cls(tmp_path, color_data):
    """Many checkpoints of ViT come without: transformers would make up random weights."""
    model, processor = save_model(tmp_path / "model", "ViT")
    transformers.ViTModel(model.config, add_pooling_layer=False).save_pretrained(tmp_path / "model")
    out, data = tmp_path / "teacher.safetensors", color_data / "val.parquet"
    compute_vision_features([str(data)], out, str(tmp_path / "model"))
    image = pq.read_table(data)["image"][0].as_py()["bytes"]
    plain = transformers.ViTModel.from_pretrained(tmp_path / "model", add_pooling_layer=False).eval()
    with torch.no_grad():
        states = plain(**processor(images=read_image(image), return_tensors="pt")).last_hidden_state
    found = TeacherFiles([out]).find(image)["teacher/pooled"].float()
    torch.testing.assert_close(found, states[0, 0], rtol=1e-3, atol=1e-3)


def test_what_was_interrupted_is_resumed(tmp_path, color_data, resnet, monkeypatch):
    whole, out, data = tmp_path / "whole.safetensors", tmp_path / "part.safetensors", [str(color_data)]
    compute_vision_features(data, whole, resnet, batch_size=8)
    write, calls = TeacherWriter.write, []

    def interrupted(self, *features):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        write(self, *features)

    monkeypatch.setattr(TeacherWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compute_vision_features(data, out, resnet, batch_size=8)
    assert len(TeacherFiles([out])) == 24
    monkeypatch.setattr(TeacherWriter, "write", lambda self, *features: calls.append(1) or write(self, *features))
    assert compute_vision_features(data, out, resnet, batch_size=8)[0] == 80
    assert len(calls) == 4 + 7  # of 10 batches
    found, expected = load_file(out), load_file(whole)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_does_not_fit_is_refused(tmp_path, color_data, resnet):
    out, data = tmp_path / "teacher.safetensors", str(color_data / "val.parquet")
    compute_vision_features([data], out, resnet)
    for sources, grid, words in (
        ([str(color_data / "train.parquet")], None, "is of other data"),
        ([data], (2, 2), "another grid"),
        ([data], (99, 2), r"is 8 × 8, not as fine as 99 × 2"),
        (["https://example.org/a.tar"], None, "fetch the shards first"),
    ):
        with pytest.raises(InputError, match=words):
            compute_vision_features(sources, out, resnet, grid)
    with pytest.raises(InputError, match="no vision model of transformers"):
        compute_vision_features([data], out, str(color_data))
    save_model(tmp_path / "vit", "ViT")
    with pytest.raises(InputError, match="another model_hash"):
        compute_vision_features([data], out, str(tmp_path / "vit"))


def test_images_that_cannot_be_read_are_named(run, tmp_path, resnet):
    rows = [{"bytes": encoded(i % 4, i) if i != 2 else b"broken", "path": f"{i}.png"} for i in range(5)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "few.parquet")
    code, _, err = run(
        "features", tmp_path / "few.parquet", "--vision", resnet, "--out", tmp_path / "t.safetensors"
    )
    assert code == 0 and "features of 4 images" in err and "few.parquet:2" in err
    assert len(TeacherFiles([tmp_path / "t.safetensors"])) == 4


def test_a_run_with_a_teacher_resumes_exactly(run, tmp_path, color_data, resnet):
    """Through the command line: a file of half of the data, a run in two halves, an export without the heads."""
    half = pq.read_table(color_data / "train.parquet").slice(0, 32)
    pq.write_table(half, tmp_path / "half.parquet")
    teacher = tmp_path / "teacher.safetensors"
    code, _, err = run("features", tmp_path / "half.parquet", "--vision", resnet, "--grid", 2, 2, "--out", teacher)
    assert code == 0, err
    data = ["--data.train", color_data / "train.parquet", "--data.classes", color_data / "classes.json"]
    patches = ["--model.vision.patch-size", 8, "--model.decoder.patch-size", 8]
    taught = ["train", "tiny", *data, *SMALL, *patches, "--steps", 4, "--teacher", teacher]
    code, _, err = run(*taught, "--out", tmp_path / "whole")
    assert code == 0 and "features of 50% of 64 training images" in err, err
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-0000004")
    shutil.rmtree(tmp_path / "resumed" / "model")
    code, _, err = run(*taught, "--out", tmp_path / "resumed", "--resume")
    assert code == 0, err
    whole, resumed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert not [name for name in whole if "head" in name]
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert all({"teacher/pooled", "teacher/grid"} < line.keys() for line in lines if "loss" in line)
    code, _, err = run(*taught, "--data.train", color_data / "val.parquet", "--out", tmp_path / "other")
    assert code == 1 and "features of none of 16 training images" in err
    code, _, err = run("train", "tiny-stage2", "--teacher", teacher, "--out", tmp_path / "stage2")
    assert code and "--teacher" in err
