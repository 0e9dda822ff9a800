"""Every command of README and docs is run as it stands, on inputs as small as they can be."""

import json
import re
import shlex
import shutil
import tarfile
from glob import glob
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import qlip

ROOT = Path(__file__).parents[2]
MODELS = Path(qlip.__file__).parent / "models"

NOT_RUN = {  # a part of a command, and why
    r"torchrun": "starts processes of its own; test_training.py and test_tokens.py run several",
    r"nvidia/|lmsys/|google/|facebook/|openai/": "takes weights from the hub",
    r"--teacher": "takes features of a model of the hub; tests/unit/jobs/test_vision_features.py writes some",
    r"verify my-tokenizer": "asks for more than two steps give",
    r"qlip push|us/mine": "writes to the hub, or reads what was written there",
    r"--engine ray": "needs a cluster; tests/unit/integrations/test_ray.py",
    r"train t2i-xl": "trains for GPUs, on features of FLAN-T5-XL",
    r"figures memory": "counts a model of the paper's size, for minutes; tests/unit/figures/test_memory.py",
    r"qlip llava": "needs a language model; test_llava.py trains, asks and scores one",
    r"--layout": "takes the prompts of a benchmark; tests/unit/jobs/test_layouts.py",
    r"eval um3-text": "needs lm-eval, which is an extra; tests/unit/eval/test_language.py",
    r"eval captions": "needs Java; tests/unit/eval/test_captions.py",
}

SHORT = "--steps 2 --warmup-steps 1 --device cpu --precision fp32 "
SMALL = "".join(
    f"--model.{tower}.hidden-size 32 --model.{tower}.intermediate-size 48 --model.{tower}.num-hidden-layers 1 "
    f"--model.{tower}.num-attention-heads 2 "
    for tower in ("vision", "decoder", "text")
)
SMALLER = {  # what a command is given beside its own options, so that it takes seconds
    r"(train|calibrate) tiny ": SHORT + SMALL + "--batch-size 4 --eval-every 1 --no-compile --data.num-workers 0",
    r"train tiny-stage2": SHORT + "--batch-size 2 --eval-every 1 --adversarial-weight 0",
    r"train (t2i|um3)-tiny": SHORT + "--batch-size 2 --eval-every 2 --no-compile",
    r"train um3-tiny": "--sequence-length 288",
    r"eval t2i .* --model": "--max-samples 4",
    r"eval (?!t2i)": "--device cpu",
    r"figures gradients": "--steps 2 --batch-size 2 --every 1 --device cpu",
    r"figures stages": "--count 2",
    r"qlip tokenize|data (check|pack)": "--num-workers 0",
}

BUNDLED = {  # models that a page takes for granted: where, and a bundled one that stands for it
    "README.md": {"MODEL": "qlip-tiny"},
    "evaluation.md": {"runs/mine/model": "qlip-tiny", "runs/t2i/model": "t2i-tiny"},
    "figures.md": {"runs/tiny/model": "qlip-tiny", "runs/tiny-stage2/model": "qlip-tiny"},
    "transformers.md": {"MODEL": "qlip-tiny"},
    "um3.md": {"RUN/model": "um3-tiny"},
    "um3-evaluation.md": {"RUN/model": "um3-tiny"},
}
FIRST = {  # commands of which a page takes for granted that they were run
    "README.md": [
        "qlip export um3-tiny --text-only --out LLAMA",
        "qlip tokenize photos/ --out tokens --keep caption",
    ],
    "export.md": ["qlip train tiny --data.train photos/ --data.val held-out/ --out runs/mine"],
    "um3-training.md": ["qlip export um3-tiny --text-only --out stories15M-6k"],
}


HEAVY = r"train|calibrate|eval|export|publish|um3|figures|runs/"  # these and what needs them


def pages() -> list[Path]:
    return [page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if commands(page)]


def commands(page: Path) -> list[str]:
    """Lines that start `qlip`, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    lines = (line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [shlex.join(shlex.split(line, comments=True)) for line in lines if re.match(r"(qlip|torchrun) ", line)]


def reason(command: str) -> str | None:
    return next((why for part, why in NOT_RUN.items() if re.search(part, command)), None)


def write_data(folder: Path, photos: list[Path], page: str) -> None:
    """What pages call photos/, held-out/, list.jsonl, train.parquet, val.parquet, shards/, stories.jsonl."""
    images = [Image.open(photo).convert("RGB").resize((64, 64)) for photo in photos[:6]]
    for i, image in enumerate(images):
        for place in (folder / "photos", folder / "registry/train" if page == "um3-training.md" else None):
            if place:
                place.mkdir(parents=True, exist_ok=True)
                image.save(place / f"{i}.png")
                (place / f"{i}.txt").write_text(f"a photo of a {photos[i].stem}")
    shutil.copytree(folder / "photos", folder / "held-out")
    images[0].save(folder / "cat.jpg")
    images[0].save(folder / "photo.jpg")
    rows = [{"image": f"photos/{i}.png", "caption": f"photo {i}"} for i in range(6)]
    for name in ("list.jsonl", "web.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    contents = [(folder / row["image"]).read_bytes() for row in rows]
    labels = {"label": pa.array(range(6))}
    captions = {"caption": [row["caption"] for row in rows]}
    for name in ("train", "more", "val", "val-000", "train-000", "registry/held-out/unseen-names"):
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        both = {"val": captions | labels, "train": captions, "more": captions}
        columns = labels if page == "figures.md" else both.get(name, labels)
        pq.write_table(pa.table({"image": [{"bytes": c, "path": None} for c in contents], **columns}), path)
    if page in ("data.md", "tokens.md"):
        (folder / "shards").mkdir()
        for i in range(128):
            with tarfile.open(folder / f"shards/{i:05d}.tar", "w") as tar:
                tar.add(folder / "cat.jpg", "cat.jpg")
                tar.add(folder / "photos/0.txt", "cat.txt")
    for name in ("classes", "registry/held-out/unseen-names"):
        (folder / f"{name}.json").write_text(json.dumps([f"name {i}" for i in range(6)]))
    for name in ("stories", "stories/train", "stories/held-out", "more-1/train", "more-2/train"):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "Once upon a time there was a little girl who had a red ball."}\n' * 40)


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_commands_run_as_they_stand(page, everything, run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path, photos, page.name)
    for place, model in BUNDLED.get(page.name, {}).items():
        shutil.copytree(MODELS / model, place)
    for command in [*FIRST.get(page.name, []), *commands(page)]:
        if reason(command) or (not everything and re.search(HEAVY, command)):
            continue
        more = " ".join(options for part, options in SMALLER.items() if re.search(part, command))
        words = [found for word in shlex.split(command) for found in (sorted(glob(word)) or [word])]
        code, out, err = run(*words[1:], *more.split())
        assert code == 0, f"{command} {more}\n{out}\n{err}"


def test_every_reason_not_to_run_a_command_is_needed():
    lines = [line for page in pages() for line in commands(page)]
    assert all(any(re.search(part, line) for line in lines) for part in NOT_RUN)
    assert sum(reason(line) is None for line in lines) > len(lines) / 2


@pytest.mark.parametrize("page", ["README.md", "docs/export.md"])
def test_the_labels_of_a_page_name_the_cat(page):
    (labels,) = re.findall(r"^words = (\[.*\])$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    model = qlip.load("qlip-tiny")
    probabilities = model.classify(Path(qlip.__file__).parent / "demo" / "photos" / "cat.jpg", json.loads(labels))
    assert probabilities[0, 0] > 0.5
