"""Features of texts by an encoder of `transformers`, such as FLAN-T5, BERT or MiniLM (extra `transformers`).

Of `qlip.t2i` the one file that imports it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlip.environment import resolve_device
from qlip.errors import InputError, MissingExtra, one_line
from qlip.model.text import check_text, context_length
from qlip.t2i.condition import check_length

try:
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
except ImportError as error:
    raise MissingExtra(
        "an encoder as condition needs the library `transformers`: pip install 'open-qlip[transformers]'"
    ) from error


class TransformersReader:
    """The last hidden states of an encoder, token by token, those of its special tokens too."""

    def __init__(self, name: str, num_text_tokens: int, device: torch.device | str = "cpu"):
        """Load the encoder; of an encoder with a decoder, such as T5, it alone, of CLIP the tower of texts.

        Args:
            name: folder or hub id.
            num_text_tokens: the most of a text that is read.
            device: where; "auto" takes a GPU if there is one.

        Raises:
            InputError: there is no such encoder.
        """
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            config = AutoConfig.from_pretrained(name)
            config = getattr(config, "text_config", config)  # of CLIP and its kin
            kind = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
            model = kind.from_pretrained(name, config=config, dtype=torch.float32)
            self.name, self.width = name, config.hidden_size
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"condition {name!r} is no encoder of transformers ({one_line(error)})") from error
        self.model = model.to(resolve_device(device)).eval()
        self.num_text_tokens = min(num_text_tokens, context_length(self.tokenizer, model, config))

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], whole: bool = False) -> list[Tensor]:
        """See `qlip.t2i.condition.TextReader`."""
        texts = [check_text(text) for text in texts]
        if whole:
            for text in texts:
                check_length(text, len(self.tokenizer(text)["input_ids"]), self.num_text_tokens)
        read = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.num_text_tokens,
            padding_side="right",
            return_tensors="pt",
        ).to(self.model.device)
        states = self.model(**read).last_hidden_state.float()
        return [row[: int(n)] for row, n in zip(states, read["attention_mask"].sum(1), strict=True)]
