"""A random Llama with a vocabulary of its own, and LLaVA's processor for 16 image tokens of 32-pixel pictures."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

WORDS = "USER: ASSISTANT: What is this? Is there a red square green blue grey in the picture? yes no Yes No"
TEMPLATE = (  # with what tells transformers where the assistant speaks
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {{ message['content'] }} "
    "{% else %}ASSISTANT:{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture(scope="session")
def llm(tmp_path_factory):
    """A folder with a random Llama as `transformers` saves it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llm")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [WORDS] * 3,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(fast),
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def processor(llm):
    """LLaVA's, as `build` makes it."""
    from transformers import AddedToken, AutoTokenizer, LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    tokenizer.pad_token = "<unk>"
    tokenizer.chat_template = TEMPLATE
    pictures = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    return LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def write_json(path, entries):
    path.write_text(json.dumps(entries))
    return path
