r"""Does a text-to-image model copy? Its drawings, each beside the training picture that is nearest to it.

    python benchmarks/t2i_nearest.py --model t2i-tiny --tokens tokens/train tokens/registry \
        --val-tokens tokens/val --out docs/results/t2i-tiny

Nearest is what has the most bits of its tokens in common: half of them by chance, all of them for a copy. Held-out
pictures, which nobody drew, say how near to the training pictures a new one may be. Writes OUT.png, OUT.json.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from PIL import Image, ImageDraw
from torch import Tensor

import qlip
from qlip.bits import sub_tokens_to_tokens, unpack
from qlip.data.samples import evenly
from qlip.data.token_dataset import TokenDataset
from qlip.environment import environment
from qlip.errors import InputError
from qlip.files import whole_file
from qlip.model.image import to_pictures
from qlip.t2i.model import PUBLISHED

PROMPTS = (
    "a photo of a goldfish.",
    "a photo of a lemon.",
    "a photo of a jellyfish.",
    "a photo of an alp.",
    "a photo of a black widow.",
    "red paper lantern",  # these three are of names that training left out
    "milky way",
    "delivery truck",
)
SIDE, GAP, MARGIN, CHUNK = 96, 4, 190, 4096


@dataclass(frozen=True)
class Arguments:
    """What is drawn, and what it is compared with.

    Attributes:
        tokens: those that the model was trained on.
        val_tokens: held-out ones.
        out: the files' name without suffix.
        model: a text-to-image model.
        prompts: what is drawn.
        num: drawings of each.
        cfg: how strongly the words count.
        max_val: held-out pictures that are looked at.
    """

    tokens: tuple[Path, ...]
    val_tokens: tuple[Path, ...]
    out: Path
    model: str = "t2i-tiny"
    prompts: tuple[str, ...] = PROMPTS
    num: int = 3
    cfg: float = 3.0
    max_val: int = 500


def read_bits(paths: tuple[Path, ...], most: int | None = None) -> Tensor:
    """Pictures of token files, all or so many, evenly spread: (n, N, L) of 0 and 1, int8."""
    data = TokenDataset(paths, bits=1)
    rows = evenly(len(data), most or len(data))
    parts = [
        data.__getitems__(rows[i : i + CHUNK])["sub_tokens"].to(torch.int8) for i in range(0, len(rows), CHUNK)
    ]
    return torch.cat(parts)


def nearest(bits: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """For each picture the share of its bits that it has in common with the nearest other, and which that is."""

    def signs(part: Tensor) -> Tensor:
        return part.flatten(1).float() * 2 - 1

    mine = signs(bits)
    found = [(mine @ signs(part).T / mine.shape[1] / 2 + 0.5).max(1) for part in others.split(CHUNK)]
    shares, chunk = torch.stack([values for values, _ in found]).max(0)
    return shares, chunk * CHUNK + torch.stack([places for _, places in found])[chunk, torch.arange(len(bits))]


def sheet(args: Arguments, drawn: list[Image.Image], near: list[Image.Image], shares: list[float]) -> Image.Image:
    """A row for each prompt; of each drawing the nearest training picture at its right."""
    width = MARGIN + args.num * (2 * SIDE + 3 * GAP)
    page = Image.new("RGB", (width, 24 + len(args.prompts) * (SIDE + 18)), "white")
    draw = ImageDraw.Draw(page)
    draw.text(
        (MARGIN, 6), "drawn | nearest of the training pictures, and the share of bits in common", fill="black"
    )
    for i, (new, old, share) in enumerate(zip(drawn, near, shares, strict=True)):
        row, column = divmod(i, args.num)
        left, top = MARGIN + column * (2 * SIDE + 3 * GAP), 24 + row * (SIDE + 18)
        if column == 0:
            draw.text((4, top + SIDE // 2 - 6), args.prompts[row][:34], fill="black")
        for k, picture in enumerate((new, old)):
            page.paste(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left + k * (SIDE + 1), top))
        draw.text((left + SIDE + 1, top + SIDE + 2), f"{share:.0%}", fill="black")
    return page


def main() -> None:
    """Draw, compare and write."""
    args = tyro.cli(Arguments, description=__doc__)
    model = qlip.load_t2i(args.model)
    tokenizer = model.tokenizer
    conditions = [row for row in model.read(args.prompts) for _ in range(args.num)]
    seeds = [k for _ in args.prompts for k in range(args.num)]
    tokens = model.model.generate(conditions, replace(PUBLISHED, guidance_scale=args.cfg), seeds)
    known, held_out = read_bits(args.tokens), read_bits(args.val_tokens, args.max_val)
    shares, places = nearest(unpack(tokens, tokenizer.config.num_bits), known)
    usual, _ = nearest(held_out, known)
    old = sub_tokens_to_tokens(known[places].long(), tokenizer.config.num_bits, 1)
    new_pictures, old_pictures = (to_pictures(tokenizer.detokenize(some)) for some in (tokens, old))
    record = {
        "model": args.model,
        "environment": environment("cpu"),
        "num_training_pictures": len(known),
        "drawn": {"mean": float(shares.mean()), "most": float(shares.max())},
        "held_out": {"mean": float(usual.mean()), "most": float(usual.max())},
    }
    print(json.dumps(record, indent=1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(args, new_pictures, old_pictures, shares.tolist()).save(args.out.with_suffix(".png"))
    with whole_file(args.out.with_suffix(".json")) as unfinished:
        unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"t2i_nearest: {error}")
