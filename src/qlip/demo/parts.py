"""What the demo's page is made of: figures, token maps, cards."""

import math
from base64 import b64encode
from html import escape

from qlip.demo.summary import Example, Rendition, Summary

NUM_GUESSES = 3


def card(summary: Summary, example: Example) -> str:
    """One photo: what it was, what became of it, and what the model calls it."""
    photo, (ours, *others) = example.photo, example.renditions
    files = "\n".join(figure(r.file, f"{photo.label} as {r.method}", r.method, _note(r)) for r in others)
    ids = [f"{token:,}" for token in example.tokens.tolist()]
    return f"""<article>
<h3>{escape(photo.label[0].upper() + photo.label[1:])}</h3>
<div class="six">
{figure(example.original, f"{photo.title}: {photo.label}", "picture", raw_size(summary))}
{token_map(summary, example)}
{figure(ours.file, f"{photo.label}, rebuilt from its tokens", "rebuilt", _note(ours))}
{files}
</div>
{_words(example)}
<details><summary>ids <span>{" · ".join(ids[:3])} …</span></summary><p>{" ".join(ids)}</p></details>
</article>"""


def figure(file: bytes, alt: str, name: str, note: str, mark: str = "") -> str:
    """An image file with its name and a note below; `mark` lies on top of it."""
    image = f'<img src="{uri(file)}" alt="{escape(alt)}">'
    return f"<figure><div>{image}{mark}</div><figcaption><b>{name}</b> {note}</figcaption></figure>"


def token_map(summary: Summary, example: Example, mark: str = "") -> str:
    """The tokens where they stand, each with its number for whoever points at it."""
    rows, columns = summary.config.grid
    cells = "".join(f'<i tabindex="-1" data-id="{token:,}"></i>' for token in example.tokens.tolist())
    image = f'<img src="{uri(example.token_map)}" alt="{rows} by {columns} tokens, coloured by their bits">'
    return f"""<figure class="map"><div>{image}{mark}</div>
<div class="cells" style="grid-template-columns:repeat({columns},1fr)" aria-hidden="true">{cells}</div>
<figcaption><b>{len(example.tokens)} tokens</b> {example.renditions[0].num_bytes:,} bytes</figcaption></figure>"""


def _words(example: Example) -> str:
    """The likeliest labels as bars, and whether the first is right."""
    if not example.guesses:
        return ""
    label, labels = example.photo.label, [guess for guess, _ in example.guesses]
    bars = "".join(
        f'<li class="{"own" if guess == label else "other"}"><span>{escape(guess)}</span>'
        f'<i style="--p:{100 * chance:.1f}%"></i><b>{100 * chance:.0f}&nbsp;%</b></li>\n'
        for guess, chance in example.guesses[:NUM_GUESSES]
    )
    rank = labels.index(label)
    if rank == 0:
        result = '<p class="right">✓ named right</p>'
    else:
        chance = 100 * example.guesses[rank][1]
        result = f'<p class="wrong">✗ named wrong; its own label is no. {rank + 1} with {chance:.0f}&nbsp;%</p>'
    return f'<div class="words">{result}\n<ol>\n{bars}</ol></div>'


def raw_size(summary: Summary) -> str:
    """What a picture takes before anything makes it small."""
    return f"{3 * math.prod(summary.config.size):,} bytes"


def _note(rendition: Rendition) -> str:
    return f"{rendition.num_bytes:,} bytes<br>{rendition.psnr:.1f} dB · {rendition.ssim:.2f}"


def uri(file: bytes) -> str:
    """An image file as the address of itself."""
    kind = {b"\xff\xd8": "jpeg", b"RI": "webp"}.get(file[:2], "avif")
    return f"data:image/{kind};base64,{b64encode(file).decode()}"
