"""UM3: a Llama with QK-norm whose vocabulary goes on with the sub-tokens of pictures (PAPER section 5).

    ids of text     0 … V_t ─┐                                ┌─ head[:V_t]  softmax over text
                             ├─ embedding ─ Transformer ──────┤
    ids of pictures V_t … V ─┘                                └─ head[V_t:]  softmax over pictures

Text targets are normalised over text, visual ones over pictures (eq. 6), and both means count alike. The
transformer is `qlip.lm`'s with nothing added, so that the model is a stock Qwen3 to other tools.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qlip.errors import InputError
from qlip.lm.checkpoint import skeleton as lm_skeleton
from qlip.lm.config import LMConfig
from qlip.lm.generate import GREEDY, Sampling, generate
from qlip.lm.loss import chunked_cross_entropy
from qlip.lm.transformer import Transformer, document_mask
from qlip.um3.config import UM3Config
from qlip.um3.layout import image_tokens, picture, positions

PUBLISHED = Sampling(top_p=0.95)  # how the paper samples
NOISE = 0.1  # of new rows, in standard deviations of the text rows


class Losses(NamedTuple):
    """What a batch adds to a step's loss: sums over its targets, divided by the counts of the whole step.

    Attributes:
        loss: (), what is minimised, the sum of the two.
        text_loss: (), −ln p of a text target.
        visual_loss: (), −ln p of a sub-token.
    """

    loss: Tensor
    text_loss: Tensor
    visual_loss: Tensor


class UM3(nn.Module):
    """The model.

    Attributes:
        config: what it is.
        lm: the transformer.
    """

    def __init__(self, config: UM3Config):
        """Draw weights; `from_llama` makes a model of a trained one."""
        super().__init__()
        self.config = config
        self.lm = Transformer(config.lm)

    @classmethod
    @torch.no_grad()
    def from_llama(
        cls,
        base: Transformer,
        config: UM3Config,
        *,
        calibration: Iterable[Tensor] = (),
        noise: float = NOISE,
        seed: int = 0,
    ) -> "UM3":
        """A trained language model, ready to learn pictures.

        New rows of embedding and head, those of pictures and of BOI and EOI, are the mean of the base's and noise.

        Args:
            base: such as `qlip.lm.checkpoint.load` reads; left as it is.
            config: see `UM3Config.of`.
            calibration: batches of ids (B, T) on which the base's queries and keys are measured: the new norms get
                the gains with which these change least, in the mean of squares. With none, the gains are 1.
            noise: its standard deviation, in those of the base's rows.
            seed: of the noise.

        Raises:
            InputError: the config is not of this base, or has no norms to calibrate.
        """
        _check_base(base.config, config)
        state = {name: value.detach().clone() for name, value in base.state_dict().items()}
        if config.lm.qk_norm and not base.config.qk_norm:
            state |= _gains(base, calibration)
        elif any(True for _ in calibration):
            raise InputError("calibration is for QK-norm that is added: leave it out")
        generator = torch.Generator().manual_seed(seed)
        state["embed_tokens.weight"] = _extended(state["embed_tokens.weight"], config, noise, generator)
        if not config.lm.tie_word_embeddings:
            state["lm_head.weight"] = _extended(base.head.detach(), config, noise, generator)
        model = skeleton(config)
        model.lm.load_state_dict(state, assign=True)
        return model.eval()

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.lm.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.lm.dtype

    def forward(
        self, input_ids: Tensor, document_ids: Tensor, num_text_targets: Tensor, num_visual_targets: Tensor
    ) -> Losses:
        """The loss of packed documents, which do not see each other.

        A token's target is the next one of its document. Losses of several calls add up to that of all their rows
        if they are given the counts of all.

        Args:
            input_ids: (B, T + 1).
            document_ids: (B, T + 1) int64, the same within a document and not in another of its row; 0 is padding.
            num_text_targets: () how many targets of the whole step are text.
            num_visual_targets: () how many are pictures'. A kind of which there are none adds nothing.

        Raises:
            InputError: T is more than the model's context.
        """
        inputs, documents, targets = input_ids[:, :-1], document_ids[:, :-1], input_ids[:, 1:]
        hidden = self.lm(inputs, positions(documents), document_mask(documents))
        counts = (documents == document_ids[:, 1:]) & (documents != 0)
        head, first = self.lm.head, self.config.num_text
        joint = self.config.softmax == "joint"
        text, visual = counts & (targets < first), counts & (targets >= first)
        words, pictures = (head, head) if joint else (head[:first], head[first:])
        text_sum = chunked_cross_entropy(hidden[text], words, targets[text])
        visual_sum = chunked_cross_entropy(hidden[visual], pictures, targets[visual] - (0 if joint else first))
        text_loss = text_sum / num_text_targets.clamp(min=1)
        visual_loss = visual_sum / num_visual_targets.clamp(min=1)
        return Losses(text_loss + visual_loss, text_loss, visual_loss)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        sampling: Sampling = PUBLISHED,
        seeds: Sequence[int] | None = None,
        *,
        images: bool = False,
        unconditional: Sequence[Sequence[int]] | None = None,
        compile: bool = False,
    ) -> Tensor:
        """Go on from ids: pictures are whole and of visual ids, the rest is text.

        Args:
            prompts: of each row its ids, from BOS.
            num_tokens: the most new ones; a row ends at EOS and is filled up with it.
            sampling: how they are drawn, from those that may come next (`ImageIds.allowed`).
            seeds: of each row; by default 0, 1, 2, …
            images: whether the model may begin pictures of its own accord.
            unconditional: see `qlip.lm.generate.generate`.
            compile: see there.

        Returns:
            (B, num_tokens) int64 ids; fewer if all rows ended before.

        Raises:
            InputError: see there.
        """
        rows, others = (
            [torch.tensor(ids, dtype=torch.long, device=self.device) for ids in part]
            for part in (prompts, unconditional or ())
        )
        before = pad_sequence(rows, batch_first=True, padding_side="left", padding_value=self.config.bos)
        rule = self.config.image_ids
        return generate(
            self.lm,
            rows,
            num_tokens,
            sampling,
            seeds=seeds,
            unconditional=others if unconditional else None,
            stop_ids=[self.config.eos],
            allowed=lambda new: rule.allowed(torch.cat((before, new), dim=1), images),
            compile=compile,
        )

    def draw(
        self,
        captions: Sequence[Sequence[int]],
        sampling: Sampling = PUBLISHED,
        seeds: Sequence[int] | None = None,
        compile: bool = False,
    ) -> Tensor:
        """Draw pictures.

        Guidance compares with `BOS BOI`, how documents of a picture and its caption begin: the model has learnt
        from them what pictures are like whatever they show, and no caption needs to be left out in training.

        Args:
            captions: ids of each.
            sampling: how sub-tokens are drawn.
            seeds: of each row; the same seed and caption give the same picture, whatever the others are.
            compile: see `qlip.lm.generate.generate`.

        Returns:
            (B, N) int64 tokens in [0, 2^L).

        Raises:
            InputError: a caption leaves no room for a picture.
        """
        bos, boi = self.config.bos, self.config.boi
        prompts, nothing = [[bos, *caption, boi] for caption in captions], [bos, boi]
        count = self.config.num_image_tokens
        self.check_captions(captions)
        drawn = self.generate(
            prompts, count, sampling, seeds, unconditional=[nothing] * len(prompts), compile=compile
        )
        return image_tokens(drawn, self.config)

    def caption(
        self,
        tokens: Tensor,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        max_tokens: int = 64,
    ) -> list[list[int]]:
        """Describe pictures.

        Args:
            tokens: (B, N) of pictures.
            sampling: how words are drawn; by default the likeliest.
            seeds: of each row.
            max_tokens: the longest caption, in ids; the context may leave less.

        Returns:
            ids of each caption, without EOS.
        """
        return self.complete([picture(row, self.config) for row in tokens], sampling, seeds, max_tokens)

    def complete(
        self,
        texts: Sequence[Sequence[int]],
        sampling: Sampling = PUBLISHED,
        seeds: Sequence[int] | None = None,
        max_tokens: int = 128,
    ) -> list[list[int]]:
        """Go on with texts, or with what `qlip.um3.layout.picture` makes of pictures, in words.

        Args:
            texts: ids of each, without BOS.
            sampling: how words are drawn.
            seeds: of each row.
            max_tokens: the most new ids of each; the context may leave less to the longest row and those beside.

        Returns:
            the new ids of each, without EOS.

        Raises:
            InputError: a text fills the context.
        """
        prompts, context = [[self.config.bos, *text] for text in texts], self.config.lm.max_position_embeddings
        longest = max(map(len, prompts))
        if longest > context:
            raise InputError(f"a text has {longest} ids, all that this model reads ({context}): shorten it")
        room = context + 1 - longest  # the last new id is not read
        rows = self.generate(prompts, min(max_tokens, room), sampling, seeds).tolist()
        return [row[: row.index(self.config.eos)] if self.config.eos in row else row for row in rows]

    def check_captions(self, captions: Sequence[Sequence[int]]) -> None:
        """Whether each leaves room for a picture.

        Raises:
            InputError: one does not.
        """
        most = self.config.max_caption_tokens
        if (longest := max(map(len, captions), default=0)) > most:
            raise InputError(
                f"a caption has {longest} ids, and {self.config.num_image_tokens} of a picture are to come: this "
                f"model reads {self.config.lm.max_position_embeddings} together, so shorten it to {most}"
            )


def skeleton(config: UM3Config) -> UM3:
    """A model whose weights are on the meta device: for `load_state_dict(…, assign=True)`."""
    with torch.device("meta"):
        return UM3(config)


def text_view(model: UM3) -> Transformer:
    """The model as a language model alone: rows of pictures are cut off, BOI and EOI stay. It shares weights."""
    count, config = model.config.num_text, model.config.lm
    view, whole = lm_skeleton(replace(config, vocab_size=count)), ("embed_tokens.weight", "lm_head.weight")
    state = {name: value[:count] if name in whole else value for name, value in model.lm.state_dict().items()}
    view.load_state_dict(state, assign=True)
    return view.eval()


def _check_base(base: LMConfig, config: UM3Config) -> None:
    free = {
        name: getattr(config.lm, name)
        for name in ("vocab_size", "qk_norm", "tie_word_embeddings", "max_position_embeddings")
    }
    grown = config.num_text >= base.vocab_size
    kept = config.lm.qk_norm >= base.qk_norm and config.lm.tie_word_embeddings <= base.tie_word_embeddings
    if not (grown and kept and replace(base, **free) == config.lm):
        raise InputError("the config is not of this language model: make it with UM3Config.of(base.config, …)")


def _extended(rows: Tensor, config: UM3Config, noise: float, generator: torch.Generator) -> Tensor:
    """The base's rows (V, D) to those of all ids; BOI and EOI are new even where the base has rows for them."""
    wide = rows.float().cpu()
    new = torch.randn(config.lm.vocab_size, wide.shape[1], generator=generator)
    new = (wide.mean(0) + noise * wide.std(0) * new).to(rows)
    kept = torch.arange(len(rows), device=rows.device)
    kept = kept[(kept != config.boi) & (kept != config.eoi)]
    new[kept] = rows[kept]
    return new


def _gains(base: Transformer, calibration: Iterable[Tensor]) -> dict[str, Tensor]:
    """Weights of the norms to be added: w that makes Σ ‖x − w · x / rms(x)‖² least, x being queries or keys."""
    width = base.config.head_width
    products = {
        f"layers.{i}.self_attn.{part}_norm.weight": torch.zeros(2, width, device=base.device)
        for i in range(len(base.layers))
        for part in "qk"
    }

    def measure(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = output.float().view(-1, width)
            normed = F.rms_norm(x, (width,), eps=base.config.rms_norm_eps)
            products[name] += torch.stack(((x * normed).sum(0), normed.square().sum(0)))

        return hook

    handles = [
        base.get_submodule(name.replace("norm.weight", "proj")).register_forward_hook(measure(name))
        for name in products
    ]
    measured = False
    try:
        for ids in calibration:
            base(ids.to(base.device))
            measured = True
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: (both[0] / both[1] if measured else torch.ones_like(both[0])).to(base.dtype)
        for name, both in products.items()
    }
