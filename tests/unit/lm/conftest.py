"""Small transformers: ours, and those of transformers."""

import pytest
import torch

from qlip.lm.config import LMConfig
from qlip.lm.transformer import Transformer

SMALL = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def small_lm(seed: int = 0, **changes) -> Transformer:
    """Weights of about the size of a trained model's, so that tokens matter to each other."""
    torch.manual_seed(seed)
    model = Transformer(LMConfig(**SMALL | changes)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15 if "embed" not in name else 1.0)
    return model


@pytest.fixture
def peer(tmp_path):
    """A random model of `transformers`, and the folder that it saved itself to."""
    transformers = pytest.importorskip("transformers")

    def build(kind: str = "Llama", shard: str = "5GB", **changes):
        torch.manual_seed(1)
        values = SMALL | {"initializer_range": 0.15, "rope_theta": 1e4, "eos_token_id": None} | changes
        model = getattr(transformers, f"{kind}ForCausalLM")(
            getattr(transformers, f"{kind}Config")(**values)
        ).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:  # they begin as ones, which would hide where they stand
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        model.save_pretrained(tmp_path / kind, max_shard_size=shard)
        return model, tmp_path / kind

    return build
