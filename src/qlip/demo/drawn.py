"""Pictures that a text-to-image model draws for the demo."""

from qlip.demo.summary import Drawing, Drawings
from qlip.eval.codecs import write_lossless
from qlip.t2i.pipeline import TextToImage

PROMPTS = ("a photo of a goldfish.", "a photo of a school bus.", "a photo of a lemon.", "a photo of an alp.")
NUM, CFG = 6, 3.0


def draw_prompts(model: TextToImage, name: str) -> Drawings:
    """Draw all prompts, with seeds from 0.

    Args:
        model: of texts.
        name: what the page calls it.
    """
    pictures = [write_lossless(picture) for picture in model.generate(PROMPTS, NUM, cfg=CFG)]
    rows = tuple(Drawing(prompt, tuple(pictures[NUM * i :][:NUM])) for i, prompt in enumerate(PROMPTS))
    return Drawings(name, sum(p.numel() for p in model.model.parameters()), CFG, rows)
