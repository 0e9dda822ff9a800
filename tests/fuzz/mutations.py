"""Changes of inputs that keep enough of their structure to get past the first check."""

import json
import random
import zlib
from collections.abc import Callable
from typing import Any

BLOCK = 512
_DEEP = json.loads("[" * 200 + "]" * 200)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**18, 10**400, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", " ", "3", "nan", "a cat", "\ud800", "\0", "\u2028", "../x", "/etc/passwd",
    "x" * 5000, [], [None], {}, {"a": {"b": []}}, [[1, 2], [3]], _DEEP,
)  # fmt: skip
BYTES = (
    b"",
    b"\0",
    b"\xff",
    b"\n",
    b"\r",
    b'"',
    b",",
    b"\t",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"[" * 5000,
)
CELLS = (b"3.0", b"NaN", b"/dev/zero", b"../a.png", b"0.png")
TAR_FIELDS = ((0, 100), (100, 108), (124, 136), (124, 136), (136, 148), (156, 157), (157, 257), (345, 500))
TAR_VALUES = (b"0", b"7777777777", b"-1", b"x", b"L", b"g", b"S", b"K", b"5", b"1", b"\xe9.png", b"../../a.png")


def change_value(rng: random.Random, value: Any) -> Any:
    """A JSON value with something in it replaced, left out, repeated or put elsewhere."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        items = dict(value) if isinstance(value, dict) else list(value)
        key = rng.choice(list(items)) if isinstance(items, dict) else rng.randrange(len(items))
        if rng.random() < 0.1:
            del items[key]
        elif rng.random() < 0.05 and isinstance(items, dict):
            items[str(rng.choice(VALUES))[:50]] = items.pop(key)
        else:
            items[key] = change_value(rng, items[key])
        return items
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.4:
        return value + rng.choice((-1, 1, 7, -value, value, value**3))
    return rng.choice(VALUES)


def change_json(rng: random.Random, text: bytes) -> bytes:
    """JSON, or bytes that once were JSON."""
    if rng.random() < 0.2:
        return change_bytes(rng, text)
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = change_value(rng, value)
    return json.dumps(value).encode()


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes with some flipped, cut out, repeated or put in."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        start = rng.randrange(len(data) + 1)
        stop = min(len(data), start + rng.choice((0, 1, 1, 4, 64, 4096)))
        middle = rng.choice(
            (rng.choice(BYTES), rng.randbytes(stop - start), data[start:stop] * 2, bytes(stop - start))
        )
        data = data[:start] + middle + data[stop:]
    return data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data


def change_lines(rng: random.Random, text: bytes) -> bytes:
    """CSV, TSV, JSON lines or plain lines."""
    lines = text.split(b"\n")
    for place in rng.sample(range(len(lines)), rng.randint(1, min(3, len(lines)))):
        line = lines[place]
        if line.startswith(b"{") and rng.random() < 0.7:
            lines[place] = json.dumps(change_value(rng, json.loads(line))).encode()
        else:
            separator = b"\t" if b"\t" in line else b","
            cells = line.split(separator)
            cells[rng.randrange(len(cells))] = rng.choice((*BYTES, *CELLS))
            lines[place] = separator.join(cells)
    text = b"\n".join(lines)
    return change_bytes(rng, text) if rng.random() < 0.2 else text


def change_tar(rng: random.Random, data: bytes) -> bytes:
    """A tar with fields of headers changed, under a right checksum, or with headers repeated."""
    blocks = [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.choice([i for i, block in enumerate(blocks) if block[257:262] == b"ustar"] or [0])
        header = bytearray(blocks[place])
        start, stop = rng.choice(TAR_FIELDS)
        long = (b"\x80" + bytes(stop - start) + b"\x7f", b"\xff" * (stop - start), rng.randbytes(stop - start))
        header[start:stop] = rng.choice((*TAR_VALUES, *long))[: stop - start].ljust(stop - start, b"\0")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        blocks[place : place + (rng.random() < 0.8)] = [bytes(header)] * rng.choice((1, 1, 1, 2, 40))
    data = b"".join(blocks)
    return change_bytes(rng, data) if rng.random() < 0.2 else data


def change_png(rng: random.Random, data: bytes) -> bytes:
    """A PNG with a chunk changed, under a right checksum, repeated or of another kind."""
    if not data.startswith(b"\x89PNG") or rng.random() < 0.3:
        return change_bytes(rng, data)
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    place = rng.randrange(len(chunks))
    kind, body = chunks[place]
    kind = rng.choice((kind, kind, kind, b"tRNS", b"zTXt", b"iCCP", b"acTL", b"fcTL", b"eXIf", b"IDAT", b"PLTE"))
    chunks[place : place + 1] = [(kind, change_bytes(rng, body))] * rng.choice((1, 1, 1, 2, 3000))
    parts = [(len(body).to_bytes(4, "big"), kind + body) for kind, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        length + part + zlib.crc32(part).to_bytes(4, "big") for length, part in parts
    )


Change = Callable[[random.Random, bytes], bytes]
