"""Image reading, and preprocessing against `transformers`' CLIPImageProcessorPil."""

import io
import json
import os
import random
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qlip.errors import InputError
from qlip.model.image import CLIP_MEAN, CLIP_STD, ImageProcessor, as_images, read_image

GREY_LEVEL = 1 / 255 / min(CLIP_STD)


def noise(width, height, channels=3, seed=0):
    """Noise shows every difference in rounding, resizing and cropping."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def photo(width=97, height=61):
    return Image.fromarray(noise(7, 5)).resize((width, height), Image.Resampling.BICUBIC)


def encode(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


FILES = {
    "png": encode(photo(), "PNG"),
    "png palette": encode(photo().quantize(16), "PNG", transparency=3),
    "png 16 bits": encode(Image.fromarray(noise(40, 30, 1).astype(np.uint16) * 257), "PNG"),
    "jpeg": encode(photo(), "JPEG"),
    "jpeg progressive": encode(photo(), "JPEG", progressive=True),
    "webp": encode(photo(), "WEBP"),
    "webp lossless": encode(photo().convert("RGBA"), "WEBP", lossless=True),
    "gif": encode(photo(), "GIF"),
    "tiff": encode(photo(), "TIFF"),
    "tiff deflate": encode(photo(), "TIFF", compression="tiff_deflate"),
    "tiff float": encode(Image.fromarray(np.asarray(photo().convert("F")) / 255), "TIFF"),
    "avif": encode(photo(), "AVIF"),
    "bmp": encode(photo(), "BMP"),
}


def pixels(image):
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def one_line(call, *words):
    with pytest.raises(InputError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    message.encode()  # a name that is no Unicode can still be printed


# --- Sources -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a b.png", "ünï 猫.jpg", "-rf", "no_suffix", ".hidden", "wrong.gif", "x.png.png"]
)
def test_any_file_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(FILES["png"])
    for source in (name, tmp_path / name, str(tmp_path / name)):
        np.testing.assert_array_equal(pixels(read_image(source)), pixels(photo()))


def test_every_form_of_a_picture_reads_the_same(tmp_path):
    array = noise(13, 7)
    image = Image.fromarray(array)
    image.save(tmp_path / "a.png")
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    forms = {
        "file": tmp_path / "a.png",
        "bytes": (tmp_path / "a.png").read_bytes(),
        "lazy PIL": Image.open(tmp_path / "a.png"),
        "PIL": image,
        "uint8 tensor": tensor,
        "float tensor": tensor.float() / 255,
        "double tensor": tensor.double() / 255,
        "tensor with a gradient": (tensor.float() / 255).requires_grad_(),
        "array": array,
        "array, channels first": tensor.numpy(),
        "float array": array / 255,
        "half array": (array / 255).astype(np.float16),
        "mirrored view": array[:, ::-1][:, ::-1],
        "with alpha": np.concatenate([array, np.full((7, 13, 1), 255, np.uint8)], -1),
    }
    for name, form in forms.items():
        np.testing.assert_array_equal(pixels(read_image(form)), array, err_msg=name)


@settings(max_examples=50, deadline=None)
@given(st.integers(5, 9), st.integers(1, 9), st.integers(0, 99), st.sampled_from([torch.float32, torch.float16]))
def test_a_float_tensor_reads_as_its_png(width, height, seed, dtype):
    tensor = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    png = encode(Image.fromarray((tensor.float() * 255).round().byte().permute(1, 2, 0).numpy()), "PNG")
    np.testing.assert_array_equal(pixels(read_image(tensor)), pixels(read_image(png)))


def test_grey_arrays():
    grey = noise(9, 5, 1)
    for form in (grey, grey[None], grey[..., None], torch.from_numpy(grey) / 255):
        np.testing.assert_array_equal(pixels(read_image(form)), np.repeat(grey[..., None], 3, -1))


def test_reading_leaves_the_source_alone():
    image = photo()
    result = read_image(image)
    result.paste(0, (0, 0, 97, 61))
    np.testing.assert_array_equal(pixels(image), pixels(photo()))


def test_images_are_told_from_lists_without_reading():
    image, array, batch = photo(), noise(4, 4), torch.rand(3, 3, 5, 4)
    assert as_images(image) == [image]
    assert as_images("missing.png") == ["missing.png"]
    assert as_images(["a.png", image, b"x"]) == ["a.png", image, b"x"]
    assert as_images(("a.png",)) == ["a.png"]
    assert as_images([]) == []
    assert len(as_images(["missing.png"] * 100_000)) == 100_000
    assert as_images(array)[0] is array
    assert [tuple(one.shape) for one in as_images(batch)] == [(3, 5, 4)] * 3
    assert as_images(batch)[0].data_ptr() == batch.data_ptr()
    assert len(as_images(np.stack([array] * 5))) == 5


# --- Modes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", sorted(set(Image.MODES) - {"I", "F", "I;16", "I;16B", "I;16L", "I;16N"}))
def test_every_mode(mode):
    """Against PIL's own conversion to RGB, by way of a mode from which it has one."""
    way = {"RGBa": "RGBA", "La": "LA", "PA": "LA"}.get(mode, "RGB")
    image = photo(24, 16).convert(way).convert(mode)
    expected = image.convert(way).convert("RGB")
    np.testing.assert_array_equal(pixels(read_image(image)), pixels(expected))


def test_16_bits_are_scaled_not_clipped():
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    expected = np.round(values / 257)[..., None].repeat(3, -1)
    images = {
        "png": encode(Image.fromarray(values), "PNG"),
        "tiff": encode(Image.fromarray(values), "TIFF"),
        "little-endian": Image.frombytes("I;16L", (64, 64), values.astype("<u2").tobytes()),
        "native": Image.frombytes("I;16N", (64, 64), values.tobytes()),
        "big-endian": Image.frombytes("I;16B", (64, 64), values.astype(">u2").tobytes()),
        "I": Image.fromarray(values.astype(np.int32)),
        "pgm": b"P5 64 64 65535\n" + values.astype(">u2").tobytes(),
    }
    for name, image in images.items():
        np.testing.assert_array_equal(pixels(read_image(image)), expected, err_msg=name)


def test_ranges_of_integers_and_floats():
    grey = np.asarray(photo().convert("L")).astype(int)[..., None].repeat(3, -1)
    for mode in ("I", "F"):  # as PIL's convert() makes them
        np.testing.assert_array_equal(pixels(read_image(photo().convert("L").convert(mode))), grey)
    unit = Image.fromarray(grey[..., 0].astype(np.float32) / 255)
    np.testing.assert_array_equal(pixels(read_image(unit)), grey)
    for values in (
        np.int32([[0, 70000]]),
        np.int32([[-1, 3]]),
        np.float32([[0, 256]]),
        np.float32([[np.nan, 0]]),
    ):
        one_line(lambda values=values: read_image(Image.fromarray(values)), "values range over")


def test_transparency_is_laid_over_white():
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 128))
    half.putpixel((1, 0), (9, 9, 9, 0))
    for image in (half, half.convert("LA"), half.convert("RGBa"), encode(half, "PNG"), encode(half, "TIFF")):
        np.testing.assert_array_equal(pixels(read_image(image))[0, :, 0], [127, 255])
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for transparency in (1, b"\xff\x00"):
        data = encode(palette, "PNG", transparency=transparency)
        np.testing.assert_array_equal(pixels(read_image(data))[0], [[10, 20, 30], [255] * 3])
    np.testing.assert_array_equal(pixels(read_image(encode(palette, "GIF", transparency=0)))[0, 0], [255] * 3)
    key = encode(Image.fromarray(np.uint8([[[1, 2, 3], [4, 5, 6]]])), "PNG", transparency=(1, 2, 3))
    np.testing.assert_array_equal(pixels(read_image(key))[0], [[255] * 3, [4, 5, 6]])


def grey_png(depth, row, clear, colour=0):
    """Two pixels, of which one value is transparent."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, colour, 0, 0, 0))
    rest = chunk(b"tRNS", clear) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + rest


@pytest.mark.parametrize(
    ("png", "second"),
    [
        (grey_png(1, b"\x40", b"\0\0"), 255),
        (grey_png(2, b"\x60", b"\0\1"), 170),
        (grey_png(4, b"\x38", b"\0\3"), 136),
        (grey_png(8, b"\x20\x80", b"\0\x20"), 128),
        (grey_png(16, b"\x12\x34\x80\x00", b"\x12\x34"), 128),
        (grey_png(16, b"\0\0\x80\x00", b"\0\0"), 128),
        (grey_png(16, b"\x12\x34" * 3 + b"\x80\x00" * 3, b"\x12\x34" * 3, colour=2), 128),
    ],
)
def test_a_transparent_value_of_every_depth(png, second):
    for form in (png, Image.open(io.BytesIO(png))):
        np.testing.assert_array_equal(pixels(read_image(form))[0, :, 0], [255, second])


@pytest.mark.parametrize(("bits", "order"), [(8, "<"), (16, "<"), (16, ">"), (32, "<")])
def test_tiff_whose_zero_is_white(bits, order):
    values = np.array([0, 1]) * {8: 255, 16: 65535, 32: 1}[bits]
    data = values.astype({8: "u1", 16: f"{order}u2", 32: f"{order}f4"}[bits]).tobytes()
    numbers = {
        256: 2,
        257: 1,
        258: bits,
        259: 1,
        262: 0,
        273: 134,
        277: 1,
        278: 1,
        279: len(data),
        339: bits // 32 * 2 + 1,
    }
    tags = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in numbers.items())
    header = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(numbers))
    tiff = header + tags + bytes(4) + data
    if order == ">":
        return one_line(lambda: read_image(tiff), "cannot be read")  # Pillow knows it little-endian alone
    for form in (tiff, Image.open(io.BytesIO(tiff))):
        np.testing.assert_array_equal(pixels(read_image(form))[0, :, 0], [255, 0])


@pytest.mark.parametrize("shape", [(1, 5, 3), (4, 7, 3), (4, 4, 3), (1, 6, 4), (3, 9, 4), (3, 9, 1), (1, 9, 1)])
def test_an_array_that_could_be_either_way_round_is_refused(shape):
    for form in (np.zeros(shape, np.uint8), torch.zeros(shape, dtype=torch.uint8)):
        one_line(lambda form=form: read_image(form), "either (C, H, W) or (H, W, C)", "pass a PIL image")


def test_modes_agree_with_transformers(reference_class):
    reference = reference_class(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
    rgba = Image.fromarray(noise(20, 10, 4))
    palette = Image.open(io.BytesIO(FILES["png palette"]))
    for image in (rgba, *map(rgba.convert, ("LA", "L", "CMYK", "1", "YCbCr")), palette):
        expected = np.asarray(reference(image)["pixel_values"][0]).transpose(1, 2, 0)
        np.testing.assert_array_equal(pixels(read_image(image)), expected, err_msg=image.mode)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation(format, orientation):
    corners = np.zeros((40, 60, 3), np.uint8)
    corners[:20, :30], corners[:20, 30:], corners[20:, :30] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {  # how a camera held otherwise lays the same picture down, by EXIF 2.3
        2: corners[:, ::-1],
        3: corners[::-1, ::-1],
        4: corners[::-1],
        5: corners.transpose(1, 0, 2),
        6: corners.transpose(1, 0, 2)[::-1],
        7: corners.transpose(1, 0, 2)[::-1, ::-1],
        8: corners.transpose(1, 0, 2)[:, ::-1],
    }.get(orientation, corners)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif)
    result = pixels(read_image(data))
    assert result.shape == corners.shape
    for y, x in ((10, 15), (10, 45), (30, 15), (30, 45)):
        assert np.abs(result[y, x] - corners[y, x]).max() < 30


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_an_orientation_is_applied_once_whatever_way_an_image_takes(tmp_path, format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a"
    path.write_bytes(encode(photo(96, 64), format, exif=exif))
    processor = ImageProcessor(32, 32)
    once = read_image(path)
    expected = pixels(processor.preprocess(path))
    saved = encode(once, "PNG")
    for form in (path.read_bytes(), Image.open(path), once, read_image(once), saved, processor.preprocess(once)):
        np.testing.assert_array_equal(pixels(processor.preprocess(form)), expected)
    loaded = Image.open(path)
    loaded.load()
    np.testing.assert_array_equal(pixels(read_image(loaded)), pixels(once))


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\xff" * 99]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_unreadable_exif_does_not_cost_the_picture(exif):
    good = pixels(read_image(encode(photo(), "JPEG")))
    np.testing.assert_array_equal(pixels(read_image(encode(photo(), "JPEG", exif=exif))), good)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_first_frame(format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    assert np.abs(pixels(read_image(data)) - [255, 0, 0]).max() < 12


# --- What is not a picture ---------------------------------------------------------------------------------


def test_bad_paths(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not an image\n" * 100)
    (tmp_path / "two\nlines.png").write_text("x")
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    one_line(lambda: read_image(tmp_path / "missing.png"), "missing.png", "No such file")
    one_line(lambda: read_image(tmp_path), tmp_path.name, "directory")
    one_line(lambda: read_image(tmp_path / "empty.png"), "empty.png", "is empty")
    one_line(lambda: read_image(tmp_path / "text.jpg"), "text.jpg", "not one of JPEG")
    one_line(lambda: read_image(tmp_path / "two\nlines.png"), "two\\nlines.png")
    one_line(lambda: read_image(tmp_path / "page.eps"), "page.eps")
    one_line(lambda: read_image("null\0.png"), "null", "cannot be opened")
    one_line(lambda: read_image(""), "cannot be opened")
    one_line(lambda: read_image("x" * 5000), "name too long")
    one_line(lambda: read_image(os.fsdecode(b"\xff.png")), "cannot be opened")
    one_line(lambda: read_image(b""), "is empty")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    (tmp_path / "a.png").write_bytes(FILES["png"])
    (tmp_path / "a.png").chmod(0)
    one_line(lambda: read_image(tmp_path / "a.png"), "a.png", "Permission denied")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_truncated_file_names_itself(tmp_path):
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        one_line(lambda name=name: read_image(tmp_path / name), name, "cannot be read as an image")
    (tmp_path / "lazy.png").write_bytes(FILES["png"][:3000])
    lazy = Image.open(tmp_path / "lazy.png")
    one_line(lambda: read_image(lazy), "lazy.png", "truncated")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files(name):
    """Cut or changed anywhere, a file reads as a picture or is an InputError of one line."""
    rng, data = random.Random(0), FILES[name]
    for i in range(60):
        damaged = bytearray(data[: rng.randrange(len(data))] if i % 3 == 0 else data)
        for _ in range(i % 3 * rng.choice([1, 2, 10])):
            damaged[rng.randrange(len(damaged) if i % 3 == 1 else min(200, len(damaged)))] = rng.randrange(256)
        try:
            assert read_image(bytes(damaged)).mode == "RGB"
        except InputError as error:
            assert "\n" not in str(error)


def bomb(width, height):
    """A small PNG whose header promises many pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize("action", ["always", "error"])
def test_decompression_bombs(tmp_path, action):
    """Between PIL's limit and twice that it only warns; we refuse both in the same words, and warn of nothing."""
    for size in [(10_000, 9_000), (14_000, 12_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)]:
        (tmp_path / "bomb.png").write_bytes(bomb(*size))
        words = (
            "bomb.png",
            f"{size[0]}x{size[1]} pixels, over the limit of",
            "raise the limit if you trust it (--max-pixels",
        )
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter(action)
            one_line(lambda: read_image(tmp_path / "bomb.png"), *words)
        assert not shown


def test_a_decoder_that_checks_the_size_itself(monkeypatch):
    data = FILES["webp"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 97 * 61 // 3)
    one_line(
        lambda: read_image(data), "pixels, over the limit of 1972", "raise the limit if you trust it (--max-pixels"
    )


def test_the_limit_is_pils(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 97 * 61 - 1)
    one_line(lambda: read_image(FILES["png"]), "97x61 pixels", "over the limit of 5916")
    for limit in (97 * 61, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert read_image(FILES["png"]).size == (97, 61)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (3, "int"),
        (None, "NoneType"),
        ([photo()], "list"),
        (noise(4, 4).astype(np.int64), "int64"),
        (torch.ones(3, 4, 4, dtype=torch.bool), "bool"),
        (np.array("a.png"), "<U5"),
        (noise(5, 5) * 1.0, "not [0, 1]"),
        (torch.full((3, 5, 5), float("nan")), "nan"),
        (torch.randn(3, 9, 9), "not [0, 1]"),
        (torch.rand(2, 3, 4, 4), "(2, 3, 4, 4)"),
        (torch.rand(5, 5, 5), "(5, 5, 5)"),
        (torch.rand(3, 0, 4), "(3, 0, 4)"),
        (torch.rand(3), "(3,)"),
        (Image.new("RGB", (0, 4)), "no pixels"),
    ],
)
def test_not_a_picture(source, words):
    one_line(lambda: read_image(source), words)


# --- Preprocessing -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference_class():
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    return module.CLIPImageProcessorPil


SIZES = [
    *[(256, 256), (640, 480), (480, 640), (641, 479), (333, 1000), (1000, 333), (257, 256), (255, 256)],
    *[(1, 1), (2, 3), (30, 20), (100, 99), (5, 200), (200, 5), (1, 500)],
]


@pytest.mark.parametrize(("resize", "crop"), [(256, 256), (224, 224), (96, 60), (64, 101)])
def test_agrees_with_transformers(reference_class, resize, crop):
    """Equal 8-bit pixels; where `preprocess` resizes in part, one grey level apart at most."""
    ours = ImageProcessor(resize, crop)
    theirs = reference_class(size={"shortest_edge": resize}, crop_size={"height": crop, "width": crop})
    for seed, (width, height) in enumerate(SIZES):
        image = Image.fromarray(noise(width, height, seed=seed))
        expected = torch.tensor(np.asarray(theirs(image)["pixel_values"]))
        result = ours(image)
        assert result.dtype == torch.float32
        assert result.shape == expected.shape == (1, 3, crop, crop)
        whole = int(resize * max(width, height) / min(width, height)) <= 64 * crop
        tolerance = 1e-5 if whole else 1.01 * GREY_LEVEL
        assert (result - expected).abs().max() <= tolerance, (width, height)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(8, 40),
    st.integers(8, 40),
    st.sampled_from([0, 1, 2, 3]),
)
def test_any_size_agrees_with_transformers(reference_class, width, height, resize, crop, resample):
    ours = ImageProcessor(resize, crop, resample)
    theirs = reference_class.from_dict({**ours.to_dict(), "do_rescale": False, "do_normalize": False})
    image = Image.fromarray(noise(width, height))
    expected = np.asarray(theirs(image)["pixel_values"][0]).transpose(1, 2, 0)
    np.testing.assert_array_equal(pixels(ours.preprocess(image)), expected)


@pytest.mark.parametrize(
    ("width", "height", "short_side"),
    [(200, 100, 64), (96, 64, 64), (97, 64, 64), (100, 100, 96), (50, 90, 96), (1, 30, 96), (30, 1, 64)],
)
def test_a_crop_that_is_no_square_is_covered(reference_class, width, height, short_side):
    """The same as CLIP's with a short side just large enough."""
    ours, image = ImageProcessor(64, (64, 96)), Image.fromarray(noise(width, height))
    theirs = reference_class(size={"shortest_edge": short_side}, crop_size={"height": 64, "width": 96})
    expected = torch.tensor(np.asarray(theirs(image)["pixel_values"]))
    assert ours(image).shape == (1, 3, 64, 96)
    assert (ours(image) - expected).abs().max() <= 1e-5


def test_another_size_keeps_the_margin():
    processor = ImageProcessor(36, 32)
    assert processor.at_size((64, 96)) == ImageProcessor(72, (64, 96))
    assert processor.at_size((64, 96)).at_size((32, 32)) == processor
    assert processor.at_size((64, 96)).preprocess(Image.new("RGB", (36, 24))).size == (96, 64)


LONG = [(9, 5000), (5000, 9), (1, 3000), (3000, 1), (9001, 40), (40, 9001)]


@pytest.mark.parametrize("resample", [1, 2, 3])
@pytest.mark.parametrize("size", LONG)
def test_a_long_picture_is_resized_in_part(size, resample):
    """The same as resizing it whole and cropping, within one grey level (measured: 1).

    The last one is shrunk and tall, where PIL takes columns first and the passes round otherwise: there it
    holds for a picture, not for noise.
    """
    values = noise(*size) if size != LONG[-1] else np.asarray(photo(*size))
    for resize, crop in [(32, 32), (32, 50), (20, 8)]:
        image = Image.fromarray(values)
        whole = [int(resize * side / min(size)) for side in size]
        left, top = ((side - crop) // 2 for side in whole)
        expected = image.resize(whole, resample).crop((left, top, left + crop, top + crop))
        result = ImageProcessor(resize, crop, resample).preprocess(image)
        assert np.abs(pixels(result) - pixels(expected)).max() <= 1


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (1, 2_000_000), (2_000_000, 1)])
def test_a_thread_of_a_picture_costs_little(size):
    """Resized whole, the larger ones would take 393 GB of memory."""
    image = Image.new("RGB", size, (10, 200, 30))
    assert (pixels(ImageProcessor(256, 256).preprocess(image)) == [10, 200, 30]).all()


def test_what_a_processor_prepared_stays_as_it_is():
    processor = ImageProcessor(24, 16)  # a second time would cut off more
    for how in ("crop", "squash"):
        prepared = processor.preprocess(photo(90, 60), how)
        assert processor.preprocess(prepared) is prepared
        torch.testing.assert_close(processor(prepared)[0], processor.normalize(prepared), rtol=0, atol=0)
    smaller = prepared.resize((8, 8))
    assert processor.preprocess(smaller).size == (16, 16)
    assert pixels(ImageProcessor(16, 16).preprocess(prepared)).shape == (16, 16, 3)


def test_what_is_left_out_is_in_the_info():
    processor = ImageProcessor(16, 16)
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime")]
    for format in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        animation = encode(frames[0], format, save_all=True, append_images=frames[1:])
        assert processor.preprocess(animation).info.get("first_frame"), format
        assert "first_frame" not in processor.preprocess(encode(frames[0], format)).info
    assert processor.preprocess(photo(90, 60)).info.get("cropped")
    assert "cropped" not in processor.preprocess(photo(90, 60), "squash").info
    assert "cropped" not in processor.preprocess(photo(60, 60)).info


def test_squashing_keeps_the_whole_image():
    prepared = ImageProcessor(16, 16).preprocess(photo(90, 60), "squash")
    np.testing.assert_array_equal(
        pixels(prepared), pixels(photo(90, 60).resize((16, 16), Image.Resampling.BICUBIC))
    )


def test_one_many_and_batches():
    processor = ImageProcessor(16, 12)
    batch = torch.rand(4, 3, 20, 30)
    expected = processor(batch)
    assert expected.shape == (4, 3, 12, 12)
    torch.testing.assert_close(processor(list(batch)), expected, rtol=0, atol=0)
    torch.testing.assert_close(processor(batch[0]), expected[:1], rtol=0, atol=0)
    torch.testing.assert_close(processor([read_image(one) for one in batch]), expected, rtol=0, atol=0)
    assert processor([FILES["jpeg"], photo(), noise(9, 9), batch[0]]).shape == (4, 3, 12, 12)
    assert processor([]).shape == (0, 3, 12, 12)
    one_line(lambda: processor(["nowhere.png"]), "nowhere.png")


def test_normalize_and_back():
    processor = ImageProcessor(8, 8)
    array = noise(9, 5)
    values = processor.normalize(array)
    assert values.shape == (3, 5, 9)
    assert values.dtype == torch.float32
    assert values.is_contiguous()
    torch.testing.assert_close(values, processor.normalize(Image.fromarray(array)), rtol=0, atol=0)
    expected = (array / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(values.permute(1, 2, 0), expected, atol=1e-6)
    back = processor.denormalize(values[None])
    np.testing.assert_array_equal((back[0] * 255).round().permute(1, 2, 0), array)
    np.testing.assert_array_equal(pixels(read_image(back[0])), array)
    far = processor.denormalize(torch.tensor([-99.0, 99.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4))
    assert far[0].eq(0).all()
    assert far[1].eq(1).all()
    assert processor.denormalize(values[None].bfloat16()).dtype == torch.float32
    for wrong in (array.astype(np.float32), array[..., 0], Image.new("L", (3, 3)), Image.new("RGBA", (3, 3))):
        one_line(lambda wrong=wrong: processor.normalize(wrong), "read_image")


# --- preprocessor_config.json ------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [256, (256, 384)])
def test_config_round_trip(tmp_path, reference_class, crop):
    processor = ImageProcessor(392, crop, resample=2, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    assert ImageProcessor.from_dict(processor.to_dict()) == processor
    processor.save(tmp_path / "new" / "folder")
    assert ImageProcessor.from_file(tmp_path / "new" / "folder" / "preprocessor_config.json") == processor
    assert hash(ImageProcessor.from_dict(processor.to_dict())) == hash(processor)

    reference_class.from_pretrained(tmp_path / "new" / "folder").save_pretrained(tmp_path / "theirs")
    assert ImageProcessor.from_file(tmp_path / "theirs" / "preprocessor_config.json") == processor


def test_config_as_published():
    old = {"crop_size": 256, "do_center_crop": True, "do_normalize": True, "do_resize": True, "size": 392}
    old |= {"feature_extractor_type": "CLIPFeatureExtractor", "image_mean": list(CLIP_MEAN), "resample": 3}
    assert ImageProcessor.from_dict(old) == ImageProcessor(392, 256)
    assert ImageProcessor.from_dict({}) == ImageProcessor(224, 224)
    nulls = {"size": {"shortest_edge": 256, "longest_edge": None}, "crop_size": None, "do_resize": None}
    assert ImageProcessor.from_dict(nulls) == ImageProcessor(256, 224)
    plain = ImageProcessor.from_dict({"do_normalize": False})
    torch.testing.assert_close(plain(torch.full((3, 9, 9), 0.2)), torch.full((1, 3, 224, 224), 0.2))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"size": "big"}, "size='big'"),
        ({"size": {"height": 9, "width": 9}}, "shortest_edge"),
        ({"size": {"shortest_edge": 256, "longest_edge": 300}}, "size="),
        ({"size": {"shortest_edge": [256]}}, "size="),
        ({"size": True}, "size=True"),
        ({"size": 0}, "resize=0"),
        ({"crop_size": -3}, "crop=-3"),
        ({"crop_size": {"height": 0, "width": 512}}, "crop=(0, 512)"),
        ({"crop_size": {"height": 256}}, "crop_size="),
        ({"resample": 99}, "resample=99"),
        ({"resample": "bicubic"}, "resample='bicubic'"),
        ({"image_mean": [0.5, 0.5]}, "mean="),
        ({"image_mean": 0.5}, "mean="),
        ({"image_mean": [0.5, 0.5, "x"]}, "mean="),
        ({"image_std": [0.5, 0.5, 0]}, "std="),
        ({"image_std": [0.5, 0.5, float("nan")]}, "std="),
        ({"do_resize": False}, "do_resize"),
        ({"do_center_crop": False}, "do_center_crop"),
        ({"do_rescale": False}, "do_rescale"),
        ({"rescale_factor": 1.0}, "rescale_factor=1.0"),
    ],
)
def test_a_malformed_field_is_named(tmp_path, config, named):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(config))
    one_line(lambda: ImageProcessor.from_file(file), str(file), named)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\udcff"])
def test_a_malformed_file_is_named(tmp_path, text):
    file = tmp_path / "preprocessor_config.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    one_line(lambda: ImageProcessor.from_file(file), str(file))
    one_line(lambda: ImageProcessor.from_file(tmp_path / "missing.json"), "missing.json", "No such file")
