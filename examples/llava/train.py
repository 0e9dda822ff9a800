r"""Both of LLaVA's stages, whole, in a minute on a CPU and without a network: what colour is the square?

    python examples/llava/train.py --out llava-squares
    qlip llava ask llava-squares/finetune/model SOME.png "What is this?"

`qlip-tiny` is the eye; the language model is a random Llama of 0.1 M parameters, so that the second stage teaches
it to speak as well. With data and models of your own the calls are the same: see docs/llava.md.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlip.llava import ask, load
from qlip.recipes.llava import RECIPES, LlavaDataConfig, run

COLOURS = {"red": (210, 40, 40), "green": (40, 190, 60), "blue": (40, 60, 210), "grey": (128, 128, 128)}
QUESTION = "What is this?"
TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}{{ message['content'] }}"
    "{{ ' ' if message['role'] == 'user' else eos_token }}"
    "{% endfor %}{{ 'ASSISTANT:' if add_generation_prompt }}"
)


@dataclass(frozen=True)
class Options:
    """How long, and where.

    Attributes:
        out: folder for everything.
        pretrain_steps: of the projector.
        finetune_steps: of projector and language model.
    """

    out: Path
    pretrain_steps: int = 20
    finetune_steps: int = 120


def make_language_model(folder: Path) -> None:
    """A random Llama and a tokenizer of few words, as a Hugging Face folder."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = [f"USER: {QUESTION} ASSISTANT: a {colour} square" for colour in COLOURS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(words, trainer)
    bpe.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=TEMPLATE, **names)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def make_data(folder: Path, count: int, seed: int) -> Path:
    """A JSON file in LLaVA's form, and its pictures: squares on noise, wide and tall."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for i in range(count):
        colour = list(COLOURS)[i % len(COLOURS)]
        width, height = rng.integers(48, 96, 2)
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        pixels[height // 6 : -height // 6, width // 6 : -width // 6] = COLOURS[colour]
        Image.fromarray(pixels).save(folder / f"{i}.png")
        turns = [("human", f"<image>\n{QUESTION}"), ("gpt", f"a {colour} square")]
        conversation = [{"from": who, "value": words} for who, words in turns]
        entries.append({"id": str(i), "image": f"{i}.png", "conversations": conversation})
    (folder / "data.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder / "data.json"


def train(options: Options) -> float:
    """Train both stages; the share of held-out squares whose colour is named."""
    out = options.out
    make_language_model(out / "llm")
    data = make_data(out / "train", 256, seed=0)
    steps = {"llava-tiny-pretrain": options.pretrain_steps, "llava-tiny-finetune": options.finetune_steps}
    recipes = {}
    for name, count in steps.items():
        recipe = RECIPES[name]
        fit = replace(recipe.fit, steps=count, warmup_steps=min(5, count - 1), eval_every=count)
        template = recipe.data.template
        where = LlavaDataConfig(train=(data,), images=data.parent, template=template, max_length=128)
        recipes[name] = replace(recipe, data=where, fit=fit, batch_size=16, device="cpu")
    first, second = recipes.values()
    run(replace(first, llm=str(out / "llm")), out / "pretrain")
    task = replace(second.task, lr=2e-3)
    run(replace(second, start=out / "pretrain" / "model", task=task), out / "finetune")

    model, processor = load(out / "finetune" / "model")
    held_out = json.loads(make_data(out / "val", 32, seed=1).read_text(encoding="utf-8"))
    images = [out / "val" / entry["image"] for entry in held_out]
    answers = ask(model, processor, images, [QUESTION] * len(images), max_new_tokens=12)
    wanted = [entry["conversations"][1]["value"] for entry in held_out]
    return sum(map(str.__eq__, answers, wanted)) / len(wanted)


if __name__ == "__main__":
    share = train(tyro.cli(Options, description=__doc__))
    print(f"{share:.0%} of 32 held-out squares have their colour named; a guess names 25%")
