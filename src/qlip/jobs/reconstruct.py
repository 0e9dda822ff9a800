"""Pictures beside what is rebuilt from their tokens, with PSNR and SSIM."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from qlip.eval.batches import Track
from qlip.eval.metrics import psnr, ssim, stack_uint8, to_uint8
from qlip.files import place_in
from qlip.jobs.pictures import Pictures, find_pictures, output_names
from qlip.jobs.tokens import save_png
from qlip.model.image import Resize
from qlip.model.qlip import QLIP


@dataclass(frozen=True)
class Rebuilt:
    """One picture's result.

    Attributes:
        path: the picture.
        output: the side-by-side picture: original left, rebuilt right.
        psnr: in dB.
        ssim: at most 1.
    """

    path: Path
    output: Path
    psnr: float
    ssim: float


def reconstruct_files(
    model: QLIP, paths: Sequence[Path], out: Path, track: Track = iter, resize: Resize = "crop"
) -> tuple[list[Rebuilt], list[str]]:
    """Tokenize and rebuild pictures at the model's size.

    Args:
        model: with an image processor.
        paths: files and folders.
        out: folder for the side-by-side PNGs.
        track: shows progress.
        resize: see `ImageProcessor.preprocess`.

    Returns:
        a result for each picture, and a line for each that failed.
    """
    pictures = Pictures(find_pictures(paths), partial(model.need_image_processor().preprocess, resize=resize))
    names = dict(zip(pictures.paths, output_names([str(path) for path in pictures.paths]), strict=True))
    results = []
    for batch, originals in pictures.batches(track):
        before, after = stack_uint8(originals), to_uint8(model.detokenize(model.tokenize(originals)))
        scores = zip(batch, originals, after, psnr(after, before), ssim(after, before), strict=True)
        for path, original, rebuilt, picture_psnr, picture_ssim in scores:
            pair = Image.new("RGB", (2 * original.width, original.height))
            pair.paste(original, (0, 0))
            pair.paste(Image.fromarray(rebuilt.permute(1, 2, 0).numpy()), (original.width, 0))
            output = place_in(out, names[path])
            save_png(pair, output)
            results.append(Rebuilt(path, output, float(picture_psnr), float(picture_ssim)))
    return results, pictures.failures
