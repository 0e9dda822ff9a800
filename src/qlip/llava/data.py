"""LLaVA's conversations about pictures: from its published JSON and a folder of pictures to training batches.

1. `ConversationFile` reads the JSON list: entries with `conversations` (turns from "human" and "gpt") and, where
they are about a picture, `image`, its path in the folder. `<image>` in the words only says that there is one.
2. `encode`: the turns in the words of a chat template, with as many image tokens as the picture has features.
Labels are the answers, each with what ends it; everything else is -100.
3. The picture is padded to a square of the mean colour, resized and normalised, by the processor that is saved
with the model.
4. Batches are padded to their longest conversation. One that says nothing about a picture has zeros for it.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlip.data.buckets import Size
from qlip.data.loader import Tokenize, TrainingSet
from qlip.data.samples import BadSample, Samples, read_picture
from qlip.data.values import read_text, text_of
from qlip.errors import InputError, one_line
from qlip.guarded import parse_json
from qlip.model.image import ImageSource, read_image

IMAGE = "<image>"
IGNORED = -100  # as a label: PyTorch's and transformers' sign
Messages = list[dict[str, str]]
_MARK = "\ue0ff"  # for private use: no text has it

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

# LLaVA's first stage: the picture, then the caption and a new line, and no words of the question.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<image>' if '<image>' in message['content'] }}"
    "{% else %}{{ message['content'] }}\n{% endif %}"
    "{% endfor %}"
)


class ConversationFile(Samples):
    """The entries of a JSON list, and their pictures."""

    def __init__(self, file: Path, images: Path | None):
        """Read the list; the pictures are read when they are asked for.

        Args:
            file: of LLaVA's form.
            images: the folder that the paths of `image` start from.

        Raises:
            InputError: it is no such list, or has pictures and there is no folder.
        """
        self.file, self.images = file, images
        try:
            entries = parse_json(read_text(file))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{file} cannot be read ({one_line(error)}): name a JSON file of LLaVA's form"
            ) from error
        if not isinstance(entries, list) or not all(isinstance(e, dict) and "conversations" in e for e in entries):
            raise InputError(f"{file}: not a list of objects with conversations, LLaVA's form")
        if images is None and any(entry.get("image") for entry in entries):
            raise InputError(f"{file} tells of pictures: name their folder with --data.images")
        # As one piece: a million small objects would be copied into each worker, for their reference counts.
        lines = [json.dumps(entry).encode() for entry in entries]
        self._ends = np.cumsum([len(line) for line in lines])
        self._lines = b"".join(lines)

    def __len__(self) -> int:
        return len(self._ends)

    def read(self, index: int) -> dict[str, Any]:
        """Entry `index`: `key`, `messages` and, of a picture, `image`, its bytes.

        Raises:
            BadSample: its picture is not there, or nobody answers in it.
        """
        start = self._ends[index - 1] if index else 0
        entry = parse_json(self._lines[start : self._ends[index]])
        key = f"{self.file}#{entry.get('id', index)}"
        sample: dict[str, Any] = {"key": key}
        if entry.get("image"):
            assert self.images is not None
            sample["image"] = read_picture(self.images / str(entry["image"]), key)
        try:
            sample["messages"] = as_messages(entry["conversations"], "image" in sample)
        except InputError as error:
            raise BadSample(key, error) from error
        return sample

    def captions(self) -> Iterator[str]:
        """None: these are no captions."""
        return iter(())


def as_messages(turns: Any, has_image: bool) -> Messages:
    """LLaVA's turns as a chat's messages; the picture, where there is one, stands before the first question.

    As in LLaVA's own training, turns before the first question are left out; so are questions without an answer.

    Raises:
        InputError: the turns have another form, or there is no answer among them.
    """
    try:
        messages = [{"role": _ROLES[turn["from"]], "content": text_of(turn["value"]) or ""} for turn in turns]
    except (KeyError, TypeError) as error:
        raise InputError(f"a turn is not from human or gpt with a value ({error!r}): leave it out") from error
    except InputError as error:
        raise InputError(f"the value of a turn {error}: leave it out") from error
    while messages and messages[0]["role"] == "assistant":
        messages.pop(0)
    while messages and messages[-1]["role"] == "user":
        messages.pop()
    if not messages:
        raise InputError("nobody answers: leave it out")
    if any(one["role"] == other["role"] for one, other in pairwise(messages)):
        raise InputError("two turns of one speaker in a row: leave it out")
    if not has_image and any(IMAGE in message["content"] for message in messages):
        raise InputError(f"{IMAGE} in the words, and no image: name it, or leave the entry out")
    for message in messages:
        message["content"] = message["content"].replace(IMAGE, "").strip()
        if message["role"] == "assistant" and not message["content"]:
            raise InputError("an answer is blank: leave it out")
    if has_image:
        messages[0]["content"] = with_image(messages[0]["content"])
    return messages


def with_image(question: str) -> str:
    """A question about an image, which stands before it, wherever the question itself has `<image>`."""
    return f"{IMAGE}\n{question.replace(IMAGE, '').strip()}"


def num_image_tokens(processor: Any) -> int:
    """How many image tokens a LLaVA processor puts in the place of `<image>`."""
    size = processor.image_processor.crop_size
    patches = (size["height"] // processor.patch_size) * (size["width"] // processor.patch_size)
    return (
        patches + processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    )


def render(tokenizer: Any, messages: Messages, template: str | None, prompt: bool = False) -> str:
    """Messages by a chat template, or None for the tokenizer's; with `prompt` up to where an answer begins."""
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )


def with_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer's beginning-of-text token is still to come before what a template wrote."""
    return tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)


def encode(
    processor: Any, messages: Messages, template: str | None = None, max_length: int = 2048
) -> dict[str, Tensor]:
    """Token ids of a conversation, and the labels among them.

    Args:
        processor: LLaVA's; its tokenizer must know where each token stands in the text, as fast ones do.
        messages: of `as_messages`.
        template: a chat template; None: the tokenizer's.
        max_length: tokens that are kept.

    Returns:
        input_ids (S,) and labels (S,) int64, IGNORED outside of the answers.

    Raises:
        InputError: the template leaves an answer out, or no answer is within max_length.
    """
    tokenizer, count = processor.tokenizer, num_image_tokens(processor)

    def write(messages: Messages, prompt: bool = False) -> str:
        text = render(tokenizer, messages, template, prompt)
        return text.replace(processor.image_token, processor.image_token * count)

    text = write(messages)
    spans = [_answer(write, messages, i) for i, message in enumerate(messages) if message["role"] == "assistant"]
    encoded = tokenizer(
        text,
        add_special_tokens=with_special_tokens(tokenizer, text),
        return_offsets_mapping=True,
        truncation=False,
    )
    input_ids = torch.tensor(encoded["input_ids"])[:max_length]
    labels = torch.full_like(input_ids, IGNORED)
    for i, (start, end) in enumerate(encoded["offset_mapping"][:max_length]):
        if start < end and any(first < end and start < last for first, last in spans):
            labels[i] = input_ids[i]
    if (labels == IGNORED).all():
        raise InputError(f"its first {max_length} tokens hold no answer: raise max_length, or leave it out")
    return {"input_ids": input_ids, "labels": labels}


def _answer(write: Callable[..., str], messages: Messages, i: int) -> tuple[int, int]:
    """Where answer `i` begins and ends in the text of a conversation, with what the template writes after it.

    A template may write the last answer otherwise than those before, as Qwen3's does with its thinking. So the
    place is that in the whole conversation: what changes there when the answer is another.
    """
    other = [*messages[:i], {"role": "assistant", "content": _MARK}, *messages[i + 1 :]]
    text, marked, alone = write(messages), write(other), write(other[: i + 1])
    if _MARK not in marked or _MARK not in alone:
        raise InputError(
            f"the chat template leaves answer {i // 2 + 1} out: use another, or shorten the conversation"
        )
    prompt = write(messages[:i], prompt=True)
    start = len(prompt) if text.startswith(prompt) else len(_beginning(text, marked))
    rest = _beginning(text[::-1], marked[::-1])[::-1]  # from the answer's end on
    end_mark = _beginning(rest, alone.partition(_MARK)[2])
    return start, len(text) - len(rest) + len(end_mark)


def _beginning(text: str, other: str) -> str:
    """What two texts begin with."""
    return commonprefix([text, other])  # noqa: RUF071  # of letters, as is meant here


class Conversations(TrainingSet):
    """Conversations as a training set; see `qlip.data.loader`."""

    def __init__(
        self, samples: Sequence[dict], processor: Any, template: str | None, max_length: int, seed: int = 0
    ):
        """Hold the samples.

        Args:
            samples: of `ConversationFile`.
            processor: LLaVA's.
            template: a chat template; None: the tokenizer's.
            max_length: tokens of a conversation that are kept.
            seed: of the order.
        """
        super().__init__(samples, partial(pixels, processor), None, seed)
        self.processor, self.template, self.max_length = processor, template, max_length
        size = processor.image_processor.crop_size
        self.no_picture = torch.zeros(3, size["height"], size["width"])

    def make(self, sample: dict[str, Any], rng: np.random.Generator, size: Size | None = None) -> dict[str, Any]:
        """What a batch has of a sample: pixel_values, input_ids, labels, key.

        Raises:
            BadSample: its picture cannot be read, or it has no answer.
        """
        try:
            made = encode(self.processor, sample["messages"], self.template, self.max_length)
            image = sample.get("image")
            made["pixel_values"] = self.no_picture if image is None else pixels(self.processor, image)
        except InputError as error:
            raise BadSample(sample["key"], error) from error
        return made | {"key": sample["key"]}

    def collate(self, samples: list[dict[str, Any]], tokenize: Tokenize | None) -> dict[str, Any]:
        """Pad them to the longest: pixel_values (B,3,H,W), input_ids, attention_mask and labels (B,S), keys."""
        tokenizer = self.processor.tokenizer

        def padded(name: str, value: int) -> Tensor:
            rows = [sample[name] for sample in samples]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        return {
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            "input_ids": padded("input_ids", tokenizer.pad_token_id),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "labels": padded("labels", IGNORED),
            "keys": [sample["key"] for sample in samples],
        }


def pixels(processor: Any, image: ImageSource) -> Tensor:
    """A picture as the model's vision tower takes it, (3, H, W).

    Raises:
        InputError: it cannot be read.
    """
    return processor.image_processor(read_image(image), return_tensors="pt")["pixel_values"][0]
