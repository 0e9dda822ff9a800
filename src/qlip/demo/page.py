"""The demo's page: one file of HTML that needs no other, and no script."""

import re
from html import escape
from importlib.metadata import version
from importlib.resources import files

from qlip.bits import unpack
from qlip.demo.drawings import drawings_section, unified_section
from qlip.demo.parts import card, figure, raw_size, token_map, uri
from qlip.demo.summary import Example, Photo, Summary
from qlip.demo.tokenmap import LARGEST_GRID_WITH_BITS
from qlip.eval.codecs import read, versions, write_lossless

LICENSES = {
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC-BY-2.0": "https://creativecommons.org/licenses/by/2.0/",
}
SMOOTH_FROM = 128  # pixels a side from which pictures are scaled smoothly


def render(summary: Summary) -> str:
    """Write the page of a demo."""
    config, name, count = summary.config, escape(summary.name), len(summary.examples)
    (height, width), style = config.size, (files("qlip.demo") / "style.css").read_text(encoding="utf-8")
    cards = "\n".join(card(summary, example) for example in summary.examples)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>A picture in {config.num_tokens} tokens: {name}</title>
<style>
{style}</style>
</head>
<body class="{"pixels" if max(height, width) < SMOOTH_FROM else "smooth"}" style="--aspect:{width}/{height}">
<main>
<header>
<p class="eyebrow">open-qlip · {name}</p>
<h1>A picture in {config.num_tokens} tokens</h1>
<p class="lead">QLIP turns a picture into a few binary tokens, and rebuilds it from nothing but these. Here
<b>{name}</b> keeps {height}&nbsp;×&nbsp;{width} pixels as {config.num_tokens} tokens of {config.num_bits} bits:
<b>{summary.rows[0].num_bytes:,.0f} bytes</b>. It learnt pictures together with words, so it can also say what
it sees.</p>
</header>
{_hero(summary, summary.examples[0])}
<section>
<h2>Beside JPEG, WebP and AVIF</h2>
{_verdict(summary)}
{_tables(summary)}
</section>
{drawings_section(summary.drawings)}
{unified_section(summary.unified, summary.examples)}
<section>
<h2>{count} photographs</h2>
<p>Each with its PSNR and SSIM, of which more is better. The files are real: of those that Pillow makes, the
nearest in size to the tokens.
{_words_verdict(summary)} {escape(summary.held_out)}</p>
<div class="cards">
{cards}
</div>
</section>
<footer>
{_credits(summary)}
{_colophon(summary)}
</footer>
</main>
</body>
</html>
"""


def _hero(summary: Summary, example: Example) -> str:
    config, photo, ours = summary.config, example.photo, example.renditions[0]
    (rows, columns), patch = config.grid, config.vision.patch_size
    row, column = rows // 2, columns // 2  # of the marked token
    index = row * columns + column
    left, top = column * patch, row * patch
    piece = read(example.original).crop((left, top, left + patch, top + patch))
    at = f"left:{100 * column / columns}%;top:{100 * row / rows}%;width:{100 / columns}%"
    mark = f'<span class="mark" style="{at}"></span>'
    bits = unpack(example.tokens[index], config.num_bits).tolist()
    cells = "".join(f'<i class="b{bit}">{bit}</i>' for bit in bits)
    bits_inside = " with its bits inside, a 1 brighter than a 0" * (max(config.grid) <= LARGEST_GRID_WITH_BITS)
    color = "rgb({}, {}, {})".format(*example.colors[index].tolist())
    return f"""<section class="hero">
<div class="strip">
{figure(example.original, f"{photo.title}: {photo.label}", "picture", raw_size(summary), mark)}
{token_map(summary, example, mark)}
{figure(ours.file, f"{photo.label}, rebuilt from its tokens", "rebuilt", f"PSNR {ours.psnr:.1f} dB")}
</div>
<figure class="token" style="--color:{color};--bits:{config.num_bits}">
<img src="{uri(write_lossless(piece))}" alt="the marked patch of the picture">
<div class="bits" role="img" aria-label="its bits: {"".join(map(str, bits))}">{cells}</div>
<figcaption>The token marked above is {config.num_bits} bits, as a number <b>{example.tokens[index]:,}</b>. It
stands for {patch}&nbsp;×&nbsp;{patch} pixels and has seen the rest of the picture too. In the middle every
token is a cell{bits_inside}; tokens that share many bits have like colours.
Point at one, or tap it, for its number.</figcaption>
</figure>
</section>"""


def _verdict(summary: Summary) -> str:
    """Who is ahead, in plain words."""
    ours, *others = summary.rows
    ahead, behind = ([r.method for r in others if (r.psnr > ours.psnr) == better] for better in (True, False))
    places = [f"behind {_and(ahead)}"] * bool(ahead) + [f"ahead of {_and(behind)}"] * bool(behind)
    too_big = [r for r in others if r.smallest > ours.num_bytes]
    floor = (
        f"No {_and([r.method for r in too_big], 'or')} of these photographs is so small: the smallest take "
        f"{_and([f'{r.smallest:,}' for r in too_big])} bytes."
    ) * bool(too_big)
    ahead_if_free = _and([r.method for r in others if r.header_free_psnr > ours.psnr]) or "no format"
    return f"""<p>In {ours.num_bytes:,.0f} bytes a picture the tokens reach {ours.psnr:.1f}&nbsp;dB:
<b>{", ".join(places)}</b>, compared at the nearest file size. {floor}</p>
<p>Every file spends bytes on a header. The second table takes as header what a plain grey picture costs, and gives
the PSNR had it been free, with {ours.num_bytes:,.0f} bytes for the picture alone: then {ahead_if_free} would be
ahead.</p>
<p>Two things stand in no column. The tokens need a decoder of {summary.decoder_size / 1e6:.1f} million parameters,
which has learnt what pictures look like. And they are made for what files are not: for language models to read
and write as words, always {summary.config.num_tokens} a picture.</p>"""


def _tables(summary: Summary) -> str:
    widest = max(r.num_bytes for r in summary.rows) / 100
    means = "".join(
        f'<tr><th scope="row">{r.method}</th><td>{r.num_bytes:,.0f}</td><td>{r.bits_per_pixel:.2f}</td>'
        f"<td>{r.psnr:.2f}</td><td>{r.ssim:.3f}</td></tr>\n"
        for r in summary.rows
    )
    headers = "".join(
        f'<tr><th scope="row">{r.method}</th><td class="bar"><i style="width:{r.header / widest:.1f}%"></i>'
        f'<b style="width:{(r.num_bytes - r.header) / widest:.1f}%"></b></td>'
        f"<td>{r.header}</td><td>{r.header_free_psnr:.2f}</td></tr>\n"
        for r in summary.rows
    )
    return f"""<div class="tables">
<table>
<caption>Means over {len(summary.examples)} photographs</caption>
<tr><td></td><th scope="col">bytes</th><th scope="col">bits/pixel</th><th scope="col">PSNR, dB</th>
<th scope="col">SSIM</th></tr>
{means}</table>
<table>
<caption>What the header costs</caption>
<tr><td></td><th scope="col" class="bar"><i></i> header <b></b> picture</th><th scope="col">header</th>
<th scope="col">PSNR, if free</th></tr>
{headers}</table>
</div>"""


def _words_verdict(summary: Summary) -> str:
    count = len(summary.examples)
    if summary.num_right is None:
        return f"{escape(summary.name)} has no text vocabulary, so it reads no words and names nothing here."
    return (
        f"Asked which of the {count} labels fits, the model names <b>{summary.num_right} of {count}</b> right; "
        f"by chance it would be one."
    )


def _credits(summary: Summary) -> str:
    items = "".join(f"<li>{_credit(example.photo)}</li>\n" for example in summary.examples)
    return f"""<h2>Credits</h2>
<p>The photographs were cropped, scaled down and encoded again, and here cropped and scaled once more. Each keeps
its own licence.</p>
<ul>
{items}</ul>"""


def _credit(photo: Photo) -> str:
    name = escape(photo.license)
    license = f'<a href="{LICENSES[photo.license]}">{name}</a>' if photo.license in LICENSES else name
    source = re.sub(r"https://[^\s<]+", r'<a href="\g<0>">\g<0></a>', escape(photo.source))
    return f"<b>{escape(photo.title)}</b>, {escape(photo.author)} · {license} · {source}"


def _colophon(summary: Summary) -> str:
    return f"""<h2>How it was made</h2>
<p>Tokenizer {escape(summary.name)}, ids {summary.id_hash}. Everything called rebuilt came from the tokens alone.
JPEG optimised, progressive where that is smaller; AVIF at speed 1, WebP at method 6; all 4:2:0. SSIM with a
Gaussian window of 11 × 11. open-qlip {version("open-qlip")}, torch {version("torch")}, Pillow {version("pillow")}
({versions()}).</p>"""


def _and(words: list[str], last: str = "and") -> str:
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
