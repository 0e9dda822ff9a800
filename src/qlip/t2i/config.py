"""What a text-to-image model is, and the published sizes."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from qlip.bits import check_bits
from qlip.errors import InputError
from qlip.guarded import check_sizes
from qlip.lm.config import LMConfig

Embedding = Literal["table", "bits"]
Head = Literal["sequence", "parallel", "chain"]
Size = Literal["tiny", "b", "l", "xl"]

CLASSES = "classes"  # the condition that is a label


def _size(width: int, mlp: int, layers: int, heads: int, dropout: float = 0.1) -> LMConfig:
    return LMConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        rms_norm_eps=1e-5,
        rope_axes=2,
        dropout=dropout,
    )


SIZES: dict[Size, LMConfig] = {
    "tiny": _size(192, 512, 6, 6, dropout=0.0),
    "b": _size(768, 2048, 12, 12),  # GPT-B of LlamaGen, 111 M
    "l": _size(1024, 2816, 24, 16),  # GPT-L, 343 M
    "xl": _size(1280, 3584, 36, 20),  # GPT-XL, 775 M; the paper's
}


@dataclass(frozen=True)
class T2IConfig:
    """A text-to-image model.

    Attributes:
        lm: the transformer; its vocabulary is that of a sub-token, its slots are those of a token. With a head
            "parallel" or "chain" it has the vocabularies of all slots, one after the other, and no slots.
        num_bits: L, the width of a token.
        bits: the width of a sub-token; divides L.
        grid: rows and columns of tokens in a picture.
        tokenizer: where the tokenizer was found: a bundled name, a folder, or a hub id.
        id_hash: the name of its ids, `QLIP.id_hash()`.
        condition: what texts are read by: "qlip", the tokenizer's own text tower; a folder or hub id of an encoder
            for `transformers`; or "classes", where there are no texts but labels.
        condition_width: of a text's features; with "classes" 0.
        num_text_tokens: the most of a text that is read; a label is one.
        num_classes: how many labels there are; of texts 0.
        condition_dropout: share of the pictures that are trained without their condition.
        embedding: of a sub-token: "table", a row for each, or "bits", a linear map of its bits.
        head: how the sub-tokens of a token are predicted: "sequence", one after the other by the transformer; or
            all from one position of it, "parallel", each by itself, or "chain", each after those before it
            (`qlip.t2i.heads`).
    """

    lm: LMConfig
    num_bits: int
    bits: int
    grid: tuple[int, int]
    tokenizer: str
    id_hash: str
    condition: str
    condition_width: int
    num_text_tokens: int
    num_classes: int = 0
    condition_dropout: float = 0.1
    embedding: Embedding = "table"
    head: Head = "sequence"

    def __post_init__(self):
        check_bits(self.num_bits, self.bits)
        check_sizes({"grid": min(self.grid), "number of tokens": self.grid[0] * self.grid[1]})
        check_sizes({"num_text_tokens": self.num_text_tokens})
        check_sizes({"condition_width": self.condition_width + 1, "num_classes": self.num_classes + 1})
        if not 0 <= self.condition_dropout < 1:
            raise InputError(f"condition_dropout is {self.condition_dropout}: it must be a share in [0, 1)")
        if self.embedding not in ("table", "bits"):
            raise InputError(f"embedding is {self.embedding!r}: choose table or bits")
        if self.head not in ("sequence", "parallel", "chain"):
            raise InputError(f"head is {self.head!r}: choose sequence, parallel or chain")
        wanted = _shape(self.num_bits, self.bits, self.grid, self.num_text_tokens, self.head)
        wanted |= {"rope_axes": 2, "tie_word_embeddings": False}
        for name, value in wanted.items():
            if getattr(self.lm, name) != value:
                raise InputError(f"lm.{name} is {getattr(self.lm, name)}, but these sub-tokens need {value}")
        if self.with_classes != (self.num_classes > 0) or self.with_classes != (self.condition_width == 0):
            raise InputError(
                f"num_classes {self.num_classes} and condition_width {self.condition_width} do not go with "
                f"condition {self.condition!r}: labels have a number and no width, texts the reverse"
            )

    @classmethod
    def of(cls, size: LMConfig, *, num_bits: int, bits: int, grid: tuple[int, int], **rest) -> "T2IConfig":
        """A model of a size, such as one of `SIZES`, with the vocabulary and the length that its tokens ask."""
        check_bits(num_bits, bits)
        shape = _shape(num_bits, bits, grid, rest["num_text_tokens"], rest.get("head", "sequence"))
        return cls(replace(size, rope_axes=2, **shape), num_bits, bits, grid, **rest)

    @property
    def with_classes(self) -> bool:
        """Whether the condition is a label."""
        return self.condition == CLASSES

    @property
    def num_slots(self) -> int:
        """Sub-tokens of a token."""
        return self.num_bits // self.bits

    @property
    def num_sub_tokens(self) -> int:
        """Sub-tokens of a picture."""
        return self.grid[0] * self.grid[1] * self.num_slots

    @property
    def slots_in_sequence(self) -> int:
        """Positions of the transformer that a token takes."""
        return self.num_slots if self.head == "sequence" else 1


def _shape(num_bits: int, bits: int, grid: tuple[int, int], num_text_tokens: int, head: Head) -> dict[str, Any]:
    """What tokens ask of the transformer."""
    slots, places = num_bits // bits, grid[0] * grid[1]
    if head == "sequence":
        shape = {"vocab_size": 2**bits, "num_slots": slots}
        places *= slots
    else:
        shape = {"vocab_size": slots * 2**bits, "num_slots": 0}
    return shape | {"max_position_embeddings": num_text_tokens + places}
