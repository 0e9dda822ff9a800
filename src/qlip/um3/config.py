"""What a UM3 is."""

from dataclasses import dataclass, replace
from typing import Literal

from qlip.bits import check_bits
from qlip.errors import InputError
from qlip.guarded import check_sizes
from qlip.lm.config import LMConfig
from qlip.lm.image_ids import ImageIds

Softmax = Literal["separate", "joint"]

FRAME = 4  # ids around picture and caption: BOS, BOI, EOI, EOS


@dataclass(frozen=True)
class UM3Config:
    """A model of text and images.

    Attributes:
        lm: the transformer; its vocabulary is text and then pictures.
        num_text: V_t, ids of text, BOI and EOI included.
        num_bits: L, the width of a token.
        bits: the width of a sub-token; divides L.
        grid: rows and columns of tokens in a picture.
        tokenizer: where the tokenizer of pictures was found: a bundled name, a folder, or a hub id.
        id_hash: the name of its ids, `QLIP.id_hash()`.
        boi, eoi: text ids before and after a picture.
        bos, eos: text ids before and after a document.
        softmax: "separate": text and visual targets each over their own vocabulary (eq. 6); "joint": over both.
    """

    lm: LMConfig
    num_text: int
    num_bits: int
    bits: int
    grid: tuple[int, int]
    tokenizer: str
    id_hash: str
    boi: int
    eoi: int
    bos: int
    eos: int
    softmax: Softmax = "separate"

    def __post_init__(self):
        check_bits(self.num_bits, self.bits)
        check_sizes({"grid": min(self.grid), "number of tokens": self.grid[0] * self.grid[1]})
        if self.softmax not in ("separate", "joint"):
            raise InputError(f"softmax is {self.softmax!r}: choose separate or joint")
        frame = {"boi": self.boi, "eoi": self.eoi, "bos": self.bos, "eos": self.eos}
        for name, value in frame.items():
            if not 0 <= value < self.num_text:
                raise InputError(f"{name} is {value}: it must be an id of text, below num_text {self.num_text}")
        if len({self.boi, self.eoi, self.bos, self.eos}) < len(frame) - (self.bos == self.eos):
            raise InputError(
                f"boi, eoi, bos and eos are {list(frame.values())}: boi and eoi need ids of their own"
            )
        wanted = {"vocab_size": self.num_text + self.num_visual, "rope_axes": 1, "num_slots": 0}
        for name, value in wanted.items():
            if getattr(self.lm, name) != value:
                raise InputError(f"lm.{name} is {getattr(self.lm, name)}, but these ids need {value}")
        if (length := self.num_image_tokens + FRAME) > self.lm.max_position_embeddings:
            raise InputError(
                f"a picture takes {length} ids ({self.num_image_tokens} sub-tokens and {FRAME} around them), "
                f"more than max_position_embeddings {self.lm.max_position_embeddings}: raise that (of a training: "
                "sequence_length), or use wider sub-tokens"
            )

    @classmethod
    def of(
        cls,
        base: LMConfig,
        *,
        num_bits: int,
        bits: int,
        grid: tuple[int, int],
        tokenizer: str,
        id_hash: str,
        boi: int,
        eoi: int,
        softmax: Softmax = "separate",
        qk_norm: bool = True,
        untie: bool = False,
        max_position_embeddings: int | None = None,
    ) -> "UM3Config":
        """What a language model becomes when pictures are added.

        Args:
            base: of the language model.
            num_bits, bits, grid, tokenizer, id_hash, boi, eoi, softmax: see the class.
            qk_norm: add it; a base that has it keeps it.
            untie: give a head that is the base's embedding weights of its own.
            max_position_embeddings: the longest sequence; by default the base's.

        Raises:
            InputError: the base names no bos or eos, or the numbers do not fit each other.
        """
        check_bits(num_bits, bits)
        eos = base.eos_token_id[0] if isinstance(base.eos_token_id, tuple) else base.eos_token_id
        if base.bos_token_id is None or eos is None:
            raise InputError("the language model's config.json lacks bos_token_id or eos_token_id: add them there")
        num_text = max(base.vocab_size, boi + 1, eoi + 1)
        lm = replace(
            base,
            vocab_size=num_text + num_bits // bits * 2**bits,
            qk_norm=base.qk_norm or qk_norm,
            tie_word_embeddings=base.tie_word_embeddings and not untie,
            max_position_embeddings=max_position_embeddings or base.max_position_embeddings,
        )
        ids = {"boi": boi, "eoi": eoi, "bos": base.bos_token_id, "eos": eos}
        return cls(lm, num_text, num_bits, bits, grid, tokenizer, id_hash, **ids, softmax=softmax)

    @property
    def image_ids(self) -> ImageIds:
        """Where pictures lie among the ids, and which id may come next."""
        return ImageIds(self.num_text, self.num_bits, self.bits, self.grid, self.boi, self.eoi)

    @property
    def num_slots(self) -> int:
        """Sub-tokens of a token."""
        return self.image_ids.num_slots

    @property
    def num_visual(self) -> int:
        """V_v, ids of pictures."""
        return self.image_ids.num_visual

    @property
    def num_image_tokens(self) -> int:
        """Sub-tokens of a picture."""
        return self.image_ids.num_image_tokens

    @property
    def max_caption_tokens(self) -> int:
        """Ids of the longest caption after which a picture can be drawn."""
        return self.lm.max_position_embeddings + 1 - self.num_image_tokens - 2  # BOS and BOI; the last is not read
