"""Questions about pictures, and the model's answers."""

from collections.abc import Sequence
from typing import Any

import torch

from qlip.errors import InputError
from qlip.llava.data import render, with_image, with_special_tokens
from qlip.model.image import ImageSource, read_image
from qlip.model.text import check_text


@torch.inference_mode()
def ask(
    model: Any,
    processor: Any,
    images: Sequence[ImageSource],
    questions: Sequence[str],
    max_new_tokens: int = 128,
) -> list[str]:
    """Ask a question about each of some pictures, at once; the answers are greedy.

    Args:
        model: LLaVA, of `load`.
        processor: its own.
        images: as many as questions.
        questions: in plain words.
        max_new_tokens: that an answer may have.

    Returns:
        an answer to each.

    Raises:
        InputError: an image cannot be read, a question is no valid text, or their numbers differ.
    """
    questions = [check_text(question) for question in questions]
    if len(images) != len(questions):
        raise InputError(f"there are {len(images)} images and {len(questions)} questions: give one for each")
    tokenizer = processor.tokenizer
    prompts = [
        render(tokenizer, [{"role": "user", "content": with_image(question)}], None, prompt=True)
        for question in questions
    ]
    inputs = processor(
        images=[read_image(image) for image in images],
        text=prompts,
        return_tensors="pt",
        padding=True,
        padding_side="left",  # so that every answer goes on where its prompt ends
        add_special_tokens=with_special_tokens(tokenizer, prompts[0]),
    ).to(model.device)
    told = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    answers = told[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
