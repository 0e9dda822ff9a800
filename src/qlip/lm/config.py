"""The transformer's configuration, in the words of Hugging Face's `config.json`."""

from dataclasses import dataclass

from qlip.errors import InputError
from qlip.guarded import check_sizes


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and later stretch their positions: `rope_scaling` of type "llama3".

    Frequencies that turn less than `low_freq_factor` times within the original context are divided by `factor`,
    those that turn more than `high_freq_factor` times stay, and between them it goes over smoothly.
    """

    factor: float = 32.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class LMConfig:
    """The transformer; below the line what `config.json` does not know.

    Attributes:
        vocab_size: rows of the embedding and of the head.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads of queries.
        num_key_value_heads: heads of keys and values; divides `num_attention_heads`. None: as many.
        head_dim: width of a head; None: `hidden_size / num_attention_heads`.
        max_position_embeddings: the longest sequence, in tokens.
        rms_norm_eps: of every RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: Llama 3's, or None.
        tie_word_embeddings: the head's weights are the embedding's.
        bos_token_id, eos_token_id: where texts begin and end, for whoever writes them; ends may be several.
        qk_norm: an RMSNorm over each head of queries and keys, before the rotation (Qwen3).
        rope_axes: 1: a position is a number. 2: it is a row and a column, each with half of the frequencies.
        num_slots: sub-tokens of a place, told apart by an embedding that is added to theirs; 0: no such one.
        dropout: of the embeddings and of what each block adds, in training; no Llama checkpoint has it.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    # ---
    qk_norm: bool = False
    rope_axes: int = 1
    num_slots: int = 0
    dropout: float = 0.0

    def __post_init__(self):
        heads, kv_heads = self.num_attention_heads, self.kv_heads
        check_sizes({name: getattr(self, name) for name in _SIZES})
        if kv_heads < 1 or heads % kv_heads:
            raise InputError(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
        if self.head_dim is None and self.hidden_size % heads:
            raise InputError(f"num_attention_heads {heads} does not divide hidden_size {self.hidden_size}")
        if not 0 < self.rms_norm_eps < 1:  # nor NaN
            raise InputError(f"rms_norm_eps is {self.rms_norm_eps}: it must be above 0, such as 1e-6")
        if self.rope_axes not in (1, 2):
            raise InputError(f"rope_axes is {self.rope_axes}: use 1 for text, 2 for rows and columns")
        check_sizes({"head_dim": self.head_width, "all heads": heads * self.head_width})
        if not self.rope_theta > 0:
            raise InputError(f"rope_theta is {self.rope_theta}: it must be positive")
        if self.head_width % (2 * self.rope_axes):
            raise InputError(
                f"head_dim {self.head_width} is not divisible by {2 * self.rope_axes}, as rotation asks"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}: it must be in [0, 1)")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    def check_length(self, length: int) -> None:
        """Whether the model reads a sequence of so many tokens.

        Raises:
            InputError: it does not.
        """
        if length > self.max_position_embeddings:
            raise InputError(
                f"the sequence has {length} tokens, more than max_position_embeddings "
                f"{self.max_position_embeddings}: shorten it, or raise that in the config"
            )
