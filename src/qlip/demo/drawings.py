"""The demo's sections on models that write tokens."""

from html import escape

from qlip.demo.parts import uri
from qlip.demo.summary import Drawing, Example, Unified, Writer


def drawings_section(writer: Writer | None) -> str:
    """What a text-to-image model drew; nothing without one."""
    if writer is None:
        return ""
    return f"""<section>
<h2>Pictures from words</h2>
<p>Tokens are made to be written, too. <b>{escape(writer.name)}</b>, a Llama of {writer.size / 1e6:.1f} million
parameters, reads a text and writes a picture's tokens one after the other; the tokenizer's decoder turns them into
pixels. It was trained for half an hour on one processor core: look at colours and layout, and expect no more.
{_how(writer)}</p>
{_drawn(writer)}
</section>"""


def unified_section(unified: Unified | None, examples: tuple[Example, ...]) -> str:
    """What a model of text and images made; nothing without one."""
    if unified is None:
        return ""
    writer, said = unified.writer, zip(examples, unified.captions, strict=True)
    figures = "\n".join(
        f'<figure><img src="{uri(example.original)}" alt="{escape(example.photo.label)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for example, caption in said
    )
    return f"""<section>
<h2>One model for both</h2>
<p><b>{escape(writer.name)}</b> began as a small Llama that tells stories, and learnt to read and write
the tokens of pictures beside its words: {writer.size / 1e6:.1f} million parameters for all of this. It still
tells stories:</p>
<blockquote><b>{escape(unified.beginning)}</b>{escape(unified.story)} …</blockquote>
<p>It says what is in a picture, here of the photographs below, the likeliest words. After three quarters of an
hour on one processor core it knows how captions sound, and rarely what they should name:</p>
<div class="said">
{figures}
</div>
<p>And it draws, not yet what it is asked for. {_how(writer)}</p>
{_drawn(writer)}
</section>"""


def _how(writer: Writer) -> str:
    return f"Guidance {writer.cfg:g}; the seeds are 0, 1, 2, …, and nothing was picked."


def _drawn(writer: Writer) -> str:
    rows = "\n".join(map(_row, writer.rows))
    return f'<div class="drawn">\n{rows}\n</div>'


def _row(drawing: Drawing) -> str:
    prompt = escape(drawing.prompt)
    images = "".join(f'<img src="{uri(file)}" alt="drawn after: {prompt}">' for file in drawing.files)
    return f'<figure><div class="row">{images}</div><figcaption>{prompt}</figcaption></figure>'
