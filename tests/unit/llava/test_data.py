"""Conversations become what transformers' own processor and template make of them; answers alone are labels."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import encoded

from qlip.data.loader import batches
from qlip.data.samples import BadSample
from qlip.errors import InputError
from qlip.llava.data import (
    IGNORED,
    PLAIN_TEMPLATE,
    ConversationFile,
    Conversations,
    as_messages,
    encode,
    num_image_tokens,
    pixels,
)
from qlip.model.image import ImageProcessor

QUESTION = {"from": "human", "value": "<image>\nWhat is this?"}
ANSWER = {"from": "gpt", "value": "a red square"}
MORE = [QUESTION, ANSWER, {"from": "human", "value": "Is there a blue square?"}, {"from": "gpt", "value": "No"}]


def labelled(processor, made):
    return processor.tokenizer.decode(made["labels"][made["labels"] != IGNORED])


@pytest.mark.parametrize("turns", [MORE[:2], MORE])
def test_as_transformers_tokenizes_and_masks(processor, turns):
    made = encode(processor, as_messages(turns, True))
    tokenizer = processor.tokenizer
    messages = [
        {"role": "user", "content": "<image>\nWhat is this?"},
        {"role": "assistant", "content": "a red square"},
        {"role": "user", "content": "Is there a blue square?"},
        {"role": "assistant", "content": "No"},
    ][: len(turns)]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    picture = Image.new("RGB", (32, 32))
    inputs = processor(images=[picture], text=[text], return_tensors="pt")
    assert torch.equal(made["input_ids"], inputs["input_ids"][0])
    assert (made["input_ids"] == processor.image_token_id).sum() == num_image_tokens(processor) == 16
    messages[0]["content"] = "<image>" * 16 + "\nWhat is this?"
    theirs = tokenizer.apply_chat_template(
        messages,
        chat_template="{{ bos_token }}" + tokenizer.chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = torch.tensor(theirs["input_ids"]), torch.tensor(theirs["assistant_masks"]).bool()
    assert torch.equal(ids, made["input_ids"])
    assert torch.equal(torch.where(mask, ids, IGNORED), made["labels"])


def test_labels_are_the_answers_and_what_ends_them(processor):
    assert labelled(processor, encode(processor, as_messages(MORE, True))) == " a red square</s> No</s>"
    # neither the question nor the end of text of another template, which begins the text by itself
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{{ '[assistant]' if add_generation_prompt }}"
    )
    made = encode(processor, as_messages(MORE, True), template)
    assert labelled(processor, made) == "a red square</s>No</s>"
    assert (made["input_ids"] == processor.tokenizer.bos_token_id).sum() == 1


def test_the_first_stage_has_no_question(processor):
    made = encode(processor, as_messages(MORE[:2], True), PLAIN_TEMPLATE)
    expected = processor.tokenizer("<image>" * 16 + "a red square\n")["input_ids"]
    assert made["input_ids"].tolist() == expected
    assert labelled(processor, made) == "a red square\n"


def test_turns_as_llava_takes_them():
    after = [{"from": "human", "value": "look <image>"}, ANSWER, {"from": "human", "value": "bye"}]
    messages = as_messages([{"from": "gpt", "value": "hello"}, *after], True)
    assert messages == [
        {"role": "user", "content": "<image>\nlook"},
        {"role": "assistant", "content": "a red square"},
    ]
    assert as_messages([{"from": "human", "value": "hi"}, ANSWER], False)[0]["content"] == "hi"
    for turns, message in {
        "[]": "nobody answers",
        json.dumps([QUESTION]): "nobody answers",
        json.dumps([{"from": "dog", "value": "woof"}]): "not from human or gpt",
        json.dumps([QUESTION, ANSWER, ANSWER]): "in a row",
    }.items():
        with pytest.raises(InputError, match=message):
            as_messages(json.loads(turns), True)
    with pytest.raises(InputError, match="no image"):
        as_messages(MORE, False)


def test_what_is_too_long(processor):
    messages = as_messages(MORE, True)
    whole = encode(processor, messages)
    cut = encode(processor, messages, max_length=len(whole["input_ids"]) - 3)
    assert torch.equal(cut["labels"], whole["labels"][:-3])
    with pytest.raises(InputError, match="raise max_length"):
        encode(processor, messages, max_length=20)


def test_a_template_that_writes_its_last_answer_differently(processor):
    template = (
        "{% for m in messages %}[{{ m.role }}]"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}{{ eos_token }}"
        "{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
    )
    made = encode(processor, as_messages(MORE, True), template)
    assert labelled(processor, made) == "a red square</s><think></think>No</s>"
    thought = [MORE[0], {"from": "gpt", "value": "<think>hm</think>red"}, *MORE[2:]]
    dropped = template.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    assert (
        labelled(processor, encode(processor, as_messages(thought, True), dropped))
        == "red</s><think></think>No</s>"
    )
    with pytest.raises(InputError, match="leaves answer 1 out"):
        encode(processor, as_messages(MORE, True), "{{ messages[-1].content }}")


def test_null_is_nothing_and_what_is_no_text_is_refused():
    turns = [{"from": "human", "value": None}, ANSWER]
    assert as_messages(turns, True)[0]["content"] == "<image>\n"
    for value, complaint in (
        (None, "blank"),
        (float("nan"), "blank"),
        (" ", "blank"),
        (["a"], "not text"),
        ("\udcff", "Unicode"),
    ):
        with pytest.raises(InputError, match=complaint):
            as_messages([QUESTION, {"from": "gpt", "value": value}], True)


def test_pictures_are_padded_with_the_mean(processor):
    wide = Image.fromarray(np.full((16, 32, 3), 255, np.uint8))
    made = pixels(processor, wide)
    assert made.shape == (3, 32, 32)
    assert made[:, :7].abs().max() < 0.015  # the mean colour in whole numbers of 8 bits: at most 1/255/0.26
    assert made[:, 10:22].min() > 1.9
    square = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8))
    assert torch.equal(pixels(processor, square), ImageProcessor(resize=32, crop=32)(square)[0])


@pytest.fixture
def data(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encoded(i, i))
    entries = [{"id": f"e{i}", "image": f"{i}.png", "conversations": MORE[: 2 + 2 * (i % 2)]} for i in range(4)]
    entries.append(
        {"id": "words", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "no"}]}
    )
    file = tmp_path / "data.json"
    file.write_text(json.dumps(entries))
    return ConversationFile(file, tmp_path)


def test_batches(processor, data):
    dataset = Conversations(data, processor, None, 128)
    batch = next(batches(dataset, None, 5))
    order = [int(key[-1]) if key[-1].isdigit() else 4 for key in batch["keys"]]
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert {name: len(value) for name, value in batch.items() if name != "keys"} == dict.fromkeys(
        ["pixel_values", "input_ids", "attention_mask", "labels"], 5
    )
    for row, i in enumerate(order):
        made = encode(processor, data[i]["messages"])
        length = int(batch["attention_mask"][row].sum())
        assert torch.equal(batch["input_ids"][row, :length], made["input_ids"])
        assert torch.equal(batch["labels"][row, :length], made["labels"])
        assert (batch["labels"][row, length:] == IGNORED).all()
        expected = pixels(processor, data[i]["image"]) if i < 4 else torch.zeros(3, 32, 32)
        assert torch.equal(batch["pixel_values"][row], expected)
    later = batches(dataset, None, 2, start_step=3)
    earlier = batches(dataset, None, 2)
    for _ in range(3):
        next(earlier)
    assert torch.equal(next(later)["input_ids"], next(earlier)["input_ids"])  # a resumed run goes on where it was


def test_files_that_are_something_else(tmp_path, data):
    with pytest.raises(InputError, match="--data.images"):
        ConversationFile(data.file, None)
    for text in ("{", '{"a": 1}', "[1]"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(InputError, match="LLaVA's form"):
            ConversationFile(tmp_path / "x.json", tmp_path)
    (tmp_path / "2.png").unlink()
    with pytest.raises(BadSample, match="e2"):
        data[2]
