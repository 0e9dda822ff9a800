"""The demo's section on pictures that were drawn."""

from html import escape

from qlip.demo.parts import uri
from qlip.demo.summary import Drawing, Drawings


def drawings_section(drawings: Drawings | None) -> str:
    """What a text-to-image model drew; nothing without one."""
    if drawings is None:
        return ""
    rows = "\n".join(map(_row, drawings.rows))
    return f"""<section>
<h2>Pictures from words</h2>
<p>Tokens are made to be written, too. <b>{escape(drawings.name)}</b>, a Llama of {drawings.size / 1e6:.1f} million
parameters, reads a text and writes a picture's tokens one after the other; the tokenizer's decoder turns them into
pixels. It was trained for minutes on small photographs: look at colours and outlines.
Guidance {drawings.cfg:g}; the seeds are 0, 1, 2, …, and nothing was picked.</p>
<div class="drawn">
{rows}
</div>
</section>"""


def _row(drawing: Drawing) -> str:
    prompt = escape(drawing.prompt)
    images = "".join(f'<img src="{uri(file)}" alt="drawn after: {prompt}">' for file in drawing.files)
    return f'<figure><div class="row">{images}</div><figcaption>{prompt}</figcaption></figure>'
