"""From a run, or any other tokenizer, to what others read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from qlip.errors import InputError
from qlip.integrations.parts import Agreement
from qlip.model.checkpoint import load, load_description
from qlip.model.qlip import QLIP
from qlip.recipes.card import write_plain_card
from qlip.recipes.record import kept_best
from qlip.train.checkpoint import best_checkpoint, checkpoint_step, latest_checkpoint, read_tensors
from qlip.um3 import checkpoint as um3
from qlip.um3.model import PUBLISHED

Format = Literal["qlip", "transformers", "onnx", "torch-export"]


def open_tokenizer(
    name: str,
    which: Literal["latest", "best"] = "latest",
    best: str | None = None,
    revision: str | None = None,
    image_size: int | Sequence[int] | None = None,
) -> tuple[QLIP, int | None]:
    """The tokenizer of a run's checkpoint, finished or not, or one that `qlip.load` finds.

    Args:
        name: folder of a run, of any number of processes, or what `qlip.load` takes.
        which: of a run the "latest" checkpoint, or the "best" by the number `best` of the evaluations.
        best: name of that number; None: the one whose best checkpoint the run keeps.
        revision: of a Hugging Face repository.
        image_size: side, or height and width, of the pictures to work on; None: the tokenizer's own.

    Returns:
        the tokenizer, in float32 on the CPU, and of a run the step that it is of.

    Raises:
        InputError: there is no such tokenizer or checkpoint, or it is damaged.
    """
    run = Path(name)
    if not (run / "description").is_dir():
        if which != "latest":
            raise InputError(f"--checkpoint {which}: {name!r} is no folder of a training run, leave it out")
        return load(name, revision=revision, image_size=image_size), None
    if revision is not None:
        raise InputError(f"revision={revision!r}: {name!r} is no Hugging Face repository, leave it out")
    if which == "best":
        best = best or kept_best(run)
        checkpoint = best_checkpoint(run, best)
    else:
        checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise InputError(f"{run} has no checkpoint" + (f" with an evaluation of {best!r}" * (which == "best")))
    model = load_description(run / "description", run.resolve().name, image_size)
    tensors = read_tensors(checkpoint, ("model.", "ema."))
    for kind in ("model.", "ema."):  # averaged weights stand in for those they are the means of
        weights = {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}
        model.load_state_dict(weights, strict=kind == "model.", assign=True)
    return model.eval(), checkpoint_step(checkpoint)


def export(model: QLIP, out: Path, format: Format = "qlip") -> Agreement | None:
    """Write a tokenizer for others.

    Args:
        model: in float32 on the CPU.
        out: folder, made if need be.
        format: "qlip": as `qlip.load` reads it; "transformers": as Hugging Face's library reads it without this
            package; "onnx", "torch-export": as programs.

    Returns:
        how far programs agree with the model.

    Raises:
        InputError: a library is missing, or the folder cannot be written.
    """
    match format:  # each one's libraries come in with it
        case "qlip":
            model.save(out)
            write_plain_card(model, out)
        case "transformers":
            from qlip.integrations.transformers import export as export_for_transformers

            export_for_transformers(model, out)
            write_plain_card(model, out)
        case "onnx":
            from qlip.integrations import onnx

            return onnx.export(model, out)
        case "torch-export":
            from qlip.integrations import torch_export

            return torch_export.export(model, out)
        case _:
            raise InputError(f"format={format!r}: use one of {', '.join(get_args(Format))}")
    return None


def export_um3(name: str, out: Path, format: Format = "qlip", text_only: bool = False) -> None:
    """Write a model of text and images for others, with the dtype of its file.

    Args:
        name: a bundled name or a folder.
        out: folder, made if need be.
        format: "qlip": as `qlip.load_um3` reads it; "transformers": as Hugging Face's library reads it, with the
            processor by which its `generate` draws. Both read either.
        text_only: leave the rows of pictures out: a language model as any other.

    Raises:
        InputError: transformers is missing, the model is damaged, or the folder cannot be written.
    """
    if format not in ("qlip", "transformers"):
        raise InputError(f"format={format!r}: a model of text and images is written as qlip or transformers")
    if format == "transformers":
        from qlip.integrations.transformers.export import LOGITS, write_code, write_generation
    folder = um3.find(name)
    if out.resolve() == folder.resolve():
        raise InputError(f"{str(out)!r} holds the model itself: name another folder")
    model, words = um3.load(folder, dtype=um3.stored_dtype(folder)), um3.open_tokenizer(folder)
    if text_only:
        um3.save_text(model, out, words)
        return
    um3.save(model, out, words)
    if format == "transformers":
        write_code(out, LOGITS)
        sampling = {name: getattr(PUBLISHED, name) for name in ("temperature", "top_k", "top_p")}
        ids = {
            "bos_token_id": model.config.bos,
            "eos_token_id": model.config.eos,
            "pad_token_id": model.config.eos,
        }
        write_generation(out, {"do_sample": True, **sampling, **ids})
