"""Which files are images, and what reading one may cost."""

import io
import os
import struct
import threading
import time
import zlib

import pytest
from PIL import Image

from qlip.errors import InputError
from qlip.image_files import FORMATS, READ_SUFFIXES, is_image_file, is_pipe, read_file
from qlip.model.image import read_image


def encode(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def small(format="PNG"):
    return encode(Image.new("RGB", (8, 8), "red"), format)


def chunk(kind, data=b""):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_every_suffix_that_pillow_gives_a_format_we_read():
    Image.init()
    known = {suffix[1:] for suffix, format in Image.registered_extensions().items() if format in (*FORMATS, "MPO")}
    assert known <= READ_SUFFIXES


@pytest.mark.parametrize("format", [*FORMATS, "MPO"])
def test_content_tells_an_image_whatever_its_name(tmp_path, format):
    for name in ("photo", "IMG_1.JPG_large", "x.dat"):
        (tmp_path / name).write_bytes(small(format))
        assert is_image_file(tmp_path / name)
    for name in ("x.txt", ".hidden", "photo.jpg~", "photo.jpg.bak"):  # captions, and what other tools leave
        (tmp_path / name).write_bytes(small(format))
        assert not is_image_file(tmp_path / name)


def test_names_and_contents_that_are_no_images(tmp_path):
    for name, content in {
        "a": b"",
        "b.doc": b"II",
        "c": b"MM here",
        "d": b"BMW\n" * 9,
        "e": b"P6",
        "f": b"RIFF",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert not is_image_file(tmp_path / name)
    os.mkdir(tmp_path / "folder")
    assert not is_image_file(tmp_path / "folder")
    assert not is_image_file(tmp_path / "missing")
    assert is_image_file(tmp_path / "IMG_7.HEIC")  # fails by its name, and is not passed over


def test_files_that_are_not_regular_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", "/dev/zero", "/dev/null"):
        with pytest.raises(InputError, match="no regular file"):
            read_file(path)
    with pytest.raises(InputError, match="no regular file"):
        read_image("/dev/zero")


def test_a_pipe_that_a_person_names_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert is_pipe(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(small(),))
    writer.start()
    assert read_image(tmp_path / "pipe").size == (8, 8)
    writer.join()


def test_a_file_of_too_many_bytes(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(small())
    monkeypatch.setenv("QLIP_MAX_IMAGE_BYTES", "20")
    with pytest.raises(InputError, match="more than 20 bytes: raise QLIP_MAX_IMAGE_BYTES"):
        read_image(tmp_path / "a.png")


def test_the_limit_of_pixels_is_an_option(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    for format in ("PNG", "TIFF", "WEBP", "GIF"):
        with pytest.raises(InputError, match="pixels, over the limit of 20: .*--max-pixels"):
            read_image(small(format))
    monkeypatch.setenv("QLIP_MAX_PIXELS", "64")
    for format in ("PNG", "TIFF", "WEBP", "GIF"):
        assert read_image(small(format)).size == (8, 8)
    monkeypatch.setenv("QLIP_MAX_PIXELS", "many")
    with pytest.raises(InputError, match="QLIP_MAX_PIXELS='many': use a number"):
        read_image(small())


def hostile_images():
    png, gif, jpeg = small(), small("GIF"), small("JPEG")
    frame = gif.index(b",", 13)
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 0), (279, 4, 1, 64)]
    tags += [(1000 + i, 7, 1_000_000, 8) for i in range(5000)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    progressive = encode(Image.new("L", (1000, 1000), 128), "JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    return {
        "progressive JPEG of 5,000 scans": progressive[:-2] + scan * 5000 + b"\xff\xd9",
        "PPM with a long comment": b"P6\n#" + b"x" * 10_000_000 + b"\n1 1\n255\nabc",
        "PNG of text chunks": png[:33] + chunk(b"tEXt", b"a\0b") * 300_000 + png[33:],
        "PNG of profiles": png[:33] + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(9_000))) * 3000 + png[33:],
        "PNG of empty IDAT chunks": png[:33] + chunk(b"IDAT") * 300_000 + png[33:],
        "GIF with a long comment": gif[:frame] + b"!\xfe" + (b"\xff" + b"c" * 255) * 100_000 + b"\0" + gif[frame:],
        "JPEG of comments": jpeg[:2] + b"\xff\xfe\0\x02" * 500_000 + jpeg[2:],
        "TIFF of tags that share their data": struct.pack("<2sHI", b"II", 42, 8) + directory + bytes(1_000_064),
        "plain PPM": b"P3\n8000 8000\n255\n" + b"1 " * 10_000_000,
        "QOI": b"qoif" + struct.pack(">IIBB", 8000, 8000, 3, 0) + b"\x55" * 10_000_000,
    }


HOSTILE = hostile_images()


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("ignore:Tag data")
def test_an_image_that_costs_more_than_it_is(name):
    content, since = HOSTILE[name], time.process_time()
    with pytest.raises(InputError, match="raise QLIP_MAX_(PIXELS|IMAGE_PARTS) if you trust it"):
        read_image(content)
    assert time.process_time() - since < 2


def test_usual_images_stay_below_the_limits():
    noise = Image.effect_noise((300, 300), 90).convert("RGB")
    for format, options in {
        "JPEG": {"progressive": True, "icc_profile": bytes(500_000), "comment": b"c" * 60_000},
        "PNG": {},
        "TIFF": {"compression": "tiff_lzw"},
        "GIF": {"comment": b"c" * 10_000},
        "QOI": {},
    }.items():
        image = noise if format != "QOI" else noise.resize((60, 60))
        assert read_image(encode(image, format, **options)).size == image.size
    many = small("GIF")
    frames = [Image.new("L", (8, 8), i % 256) for i in range(600)]
    many = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_image(many).size == (8, 8)  # hundreds of frames are not looked at


def test_limits_can_be_raised(monkeypatch):
    content = b"P6\n#" + b"x" * 5000 + b"\n1 1\n255\nabc"
    with pytest.raises(InputError, match="raise QLIP_MAX_IMAGE_PARTS"):
        read_image(content)
    monkeypatch.setenv("QLIP_MAX_IMAGE_PARTS", "6000")
    assert read_image(content).size == (1, 1)
