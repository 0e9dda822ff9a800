import io
import json
import re
from base64 import b64decode
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import qlip
from qlip.bits import unpack
from qlip.demo import report
from qlip.demo.drawn import CFG, NUM
from qlip.demo.report import TEMPLATES, build, print_summary, read_photos
from qlip.demo.tokenmap import CELL, GAP, ZERO_SHADE, draw, token_colors
from qlip.errors import InputError
from qlip.eval.codecs import CODECS, read
from qlip.eval.metrics import to_uint8
from qlip.model.checkpoint import BUNDLED
from qlip.model.config import PRESETS
from qlip.model.image import ImageProcessor
from qlip.model.qlip import QLIP
from qlip.model.text import TextTokenizer

FEW = 3  # photos of most tests: AVIF files take time


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    labels = [photo.label for photo, _ in read_photos()]
    words = TextTokenizer.train(labels, 600, PRESETS["tiny"].text.max_position_embeddings)
    return QLIP(PRESETS["tiny"], name="a <model>", image_processor=ImageProcessor(64, 64), text_tokenizer=words)


@pytest.fixture(scope="module")
def few():
    with pytest.MonkeyPatch.context() as patch:
        photos = read_photos()[:FEW]
        patch.setattr(report, "read_photos", lambda: photos)
        yield


@pytest.fixture(scope="module")
def summary(model, few, tmp_path_factory):
    return build(model, tmp_path_factory.mktemp("demo") / "new" / "folder")


@pytest.fixture(scope="module")
def page(summary):
    return summary.path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def cards(page):
    """Of each photo: by method the shown file, and what its caption says."""
    return [
        {
            name: (b64decode(data), *map(float, re.findall(r"\d[\d.]*", note.replace(",", ""))))
            for data, name, note in re.findall(
                r'src="data:image/\w+;base64,([^"]+)".*?<figcaption><b>(.*?)</b> (.*?)</figcaption>',
                card,
                re.DOTALL,
            )
        }
        for card in re.findall(r"<article>.*?</article>", page, re.DOTALL)
    ]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(report, "CODECS", CODECS[:1])


def test_page_needs_no_other_file(page):
    body, footer = page.split("<footer>")
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|href)="([^"]*)"', body))
    assert all(link.startswith("https://") for link in re.findall(r'(?:src|href)="([^"]*)"', footer))
    assert not re.search(r"<script|<iframe|@import|url\(|\son\w+=", page)
    assert "a &lt;model&gt;" in page and "<model>" not in page
    assert len(re.findall(r"<img ", page)) == len(re.findall(r'<img [^>]*alt="[^"]+"', page))


def test_numbers_are_those_of_the_pictures_shown(cards):
    assert len(cards) == FEW
    for card in cards:
        original = np.array(read(card["picture"][0]))
        for name in ("rebuilt", "JPEG", "WebP", "AVIF"):
            file, _, psnr, ssim = card[name]
            shown = np.array(read(file))
            assert psnr == pytest.approx(peak_signal_noise_ratio(original, shown), abs=0.0501)
            expected = structural_similarity(
                original, shown, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
            assert ssim == pytest.approx(expected, abs=0.00501)


def test_sizes_are_those_of_the_files_shown(cards):
    for card in cards:
        assert [card[name][1] for name in ("picture", "rebuilt", "64 tokens")] == [3 * 64 * 64, 224, 224]
        for codec in CODECS:
            file, size = card[codec.name][:2]
            assert len(file) == size
            assert Image.open(io.BytesIO(file)).format == codec.name.upper()


def test_table_holds_the_means(summary, page, cards):
    for row, name in zip(summary.rows, ("rebuilt", "JPEG", "WebP", "AVIF"), strict=True):
        size, psnr, ssim = np.mean([card[name][1:] for card in cards], axis=0)
        assert (row.num_bytes, row.bits_per_pixel) == pytest.approx((size, size * 8 / 64**2))
        assert row.psnr == pytest.approx(psnr, abs=0.0501) and row.ssim == pytest.approx(ssim, abs=0.00501)
        cells = f"<td>{row.num_bytes:,.0f}</td><td>{row.bits_per_pixel:.2f}</td><td>{row.psnr:.2f}</td>"
        assert f'<tr><th scope="row">{row.method}</th>{cells}' in page


def test_rebuilt_pictures_come_from_the_tokens_shown(model, page, cards):
    ids = re.findall(r"</summary><p>([\d, ]+)</p>", page)
    tokens = torch.tensor([[int(i.replace(",", "")) for i in line.split()] for line in ids])
    shown = np.stack([np.array(read(card["rebuilt"][0])) for card in cards])
    assert np.array_equal(shown, to_uint8(model.detokenize(tokens)).permute(0, 2, 3, 1).numpy())


def test_words_are_the_models(model, summary, page):
    labels = [photo.label for photo, _ in read_photos()[:FEW]]
    chances = model.classify([file for _, file in read_photos()[:FEW]], labels, TEMPLATES)
    shown = re.findall(r'<p class="(right|wrong)">', page)
    assert shown == [("wrong", "right")[bool(row.argmax() == i)] for i, row in enumerate(chances)]
    assert summary.num_right == shown.count("right")
    assert f"{summary.num_right} of {FEW}" in page
    for example, row in zip(summary.examples, chances, strict=True):
        assert dict(example.guesses) == pytest.approx(dict(zip(labels, row.tolist(), strict=True)))
        assert example.guesses[0][1] == max(row)


def test_same_model_gives_the_same_page(model, summary, few, tmp_path):
    assert build(model, tmp_path).path.read_bytes() == summary.path.read_bytes()


def test_all_photos_are_shown_and_credited(model, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "read_photos", read_photos)
    page = unescape(build(model, tmp_path).path.read_text(encoding="utf-8"))
    photos = [photo for photo, _ in read_photos()]
    assert len(photos) == 12 and page.count("<article>") == 12
    credits = page[page.index("<h2>Credits</h2>") :]
    for photo in photos:
        assert f"<b>{photo.title}</b>, {photo.author}" in credits and photo.license in credits
        assert f'alt="{photo.title}: {photo.label}"' in page


def test_without_a_vocabulary_the_words_are_left_out(few, quick, tmp_path):
    torch.manual_seed(0)
    mute = QLIP(PRESETS["tiny"], name="mute", image_processor=ImageProcessor(64, 64))
    summary = build(mute, tmp_path)
    page = summary.path.read_text(encoding="utf-8")
    assert "mute has no text vocabulary" in page and 'class="words"' not in page
    console = Console(record=True, file=io.StringIO())
    print_summary(summary, console)
    assert "Words: none" in console.export_text()


def test_terminal_shows_the_numbers_and_the_path(summary):
    console = Console(width=80, file=io.StringIO())
    print_summary(summary, console)
    text = console.file.getvalue()
    assert str(summary.path) in text.splitlines()[-1]
    for row in summary.rows:
        line = next(line for line in text.splitlines() if line.strip().startswith(row.method))
        assert [f"{row.num_bytes:,.0f}", f"{row.psnr:.2f}", f"{row.ssim:.3f}"] == np.array(line.split())[
            [1, 3, 4]
        ].tolist()


def test_page_appears_whole_or_not_at_all(model, few, quick, tmp_path, monkeypatch):
    (tmp_path / "index.html").write_text("the old page")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(InputError, match=r"index\.html cannot be written \(No space left\)"):
        build(model, tmp_path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("index.html", "the old page")]


def test_unusable_folder_is_named(model, few, quick, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/index\.html cannot be written"):
        build(model, tmp_path / "file")


@pytest.mark.parametrize("codec", CODECS[:2], ids=lambda codec: codec.name)
def test_nearest_is_nearest_of_all_qualities(codec):
    for _, file in read_photos()[:FEW]:
        picture = ImageProcessor(64, 64).preprocess(file)
        sizes = [len(codec.encode(picture, quality)) for quality in range(codec.lowest, codec.highest + 1)]
        for target, nearest in zip((224, 700), codec.nearest(codec.encoder(picture), 224, 700), strict=True):
            assert abs(len(nearest) - target) == min(abs(size - target) for size in sizes)


def test_codec_that_pillow_lacks_is_named(monkeypatch):
    monkeypatch.delitem(Image.SAVE, "AVIF")
    monkeypatch.setattr(Image, "init", lambda: None)
    with pytest.raises(InputError, match="this Pillow writes no AVIF"):
        CODECS[2].header_size((64, 64))


def test_token_map_shows_every_bit():
    bits = unpack(torch.randint(2**28, (2, 64)), 28)
    bits[0, 1] = bits[0, 0]
    colors = token_colors(bits)
    assert torch.equal(colors[0, 0], colors[0, 1])
    picture = np.array(draw(bits[0], colors[0], (8, 8)))
    side = CELL + GAP
    assert picture.shape == (8 * side, 8 * side, 4)
    for token, (row, column) in ((0, (0, 0)), (13, (1, 5)), (63, (7, 7))):
        cell = picture[row * side :, column * side :][GAP // 2 : CELL, GAP // 2 : CELL, :3]
        seen = cell[3::7, 2::4].reshape(28, 3)  # bits stand in 4 rows of 7
        assert np.array_equal((seen == colors[0, token].numpy()).all(-1), bits[0, token].numpy().astype(bool))


@pytest.mark.parametrize(
    ("grid", "num_bits"), [((1, 1), 1), ((2, 2), 2), ((3, 3), 13), ((32, 32), 28), ((16, 16), 63), ((2, 5), 4)]
)
def test_token_map_of_any_shape(grid, num_bits):
    rows, columns = grid
    bits = torch.randint(2, (3, rows * columns, num_bits))
    colors = token_colors(bits)
    assert colors.shape == (3, rows * columns, 3)
    picture = draw(bits[0], colors[0], grid)
    cell = picture.height // rows
    assert (picture.width % columns, picture.height % rows) == (0, 0)
    for token in (0, columns - 1, (rows - 1) * columns, rows * columns - 1):
        x, y = (token % columns + 0.5) * picture.width / columns, (token // columns + 0.5) * cell
        shades = [np.array(picture.getpixel((int(x), int(y))))[:3], colors[0, token].numpy()]
        assert min(np.abs(shades[0] - shade * shades[1]).max() for shade in (1, ZERO_SHADE)) <= 1


def test_a_page_of_pictures_that_are_no_squares(small_model, tmp_path):
    config = small_model.config.at_size((16, 32))
    model = QLIP(config, name="wide", image_processor=small_model.image_processor.at_size((16, 32)))
    page = build(model, tmp_path).path.read_text()
    assert "--aspect:32/16" in page and "16&nbsp;×&nbsp;32 pixels as 8 tokens" in page
    assert "repeat(4,1fr)" in page and "2 by 4 tokens" in page and "1,536 bytes" in page


def test_equal_tokens_have_equal_colors():
    colors = token_colors(torch.ones(2, 64, 28, dtype=torch.int64))
    assert (colors == colors[0, 0]).all()


def test_a_bundled_tokenizer_brings_its_held_out_numbers(model, summary, few, quick, tmp_path):
    measured = json.loads((BUNDLED / "qlip-tiny" / "results.json").read_text(encoding="utf-8"))
    shown = build(qlip.load("qlip-tiny"), tmp_path)
    assert f"PSNR {measured['results']['psnr']:.2f} dB" in shown.held_out
    assert f"{measured['results']['top1']:.1%} of them right among 200" in shown.held_out
    page = shown.path.read_text(encoding="utf-8")
    assert shown.held_out in unescape(page)
    assert summary.held_out == ""
    assert shown.drawings.name == "t2i-tiny" and shown.unified.writer.name == "um3-tiny"
    assert page.count("drawn after: a photo of a lemon.") == 2 * NUM
    assert all(caption.startswith("a photo of") for caption in shown.unified.captions)
    (lemon,) = qlip.load_t2i("t2i-tiny").generate("a photo of a lemon.", cfg=CFG)
    lemons = next(row.files for row in shown.drawings.rows if row.prompt == "a photo of a lemon.")
    assert np.array_equal(np.asarray(read(lemons[0])), np.asarray(lemon))
    assert summary.drawings is None and "Pictures from words" not in summary.path.read_text(encoding="utf-8")
    model.name = "qlip-tiny"  # as a folder of that name is called
    try:
        assert build(model, tmp_path).held_out == ""
    finally:
        model.name = summary.name
