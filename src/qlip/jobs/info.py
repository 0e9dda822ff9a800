"""What a tokenizer is, in a few facts."""

from qlip.model.qlip import QLIP


def describe_model(model: QLIP) -> dict[str, str | int]:
    """Sizes, tokens and bits of a tokenizer, for `qlip info`."""
    config = model.config
    image, text = config.vision, config.text
    (height, width), (rows, columns) = config.size, config.grid
    num_bits = config.num_tokens * config.num_bits
    parts = {
        "encoder": model.vision_model,
        "decoder": model.vision_decoder,
        "text": model.text_model,
    }
    sizes = [f"{name} {_millions(sum(p.numel() for p in m.parameters()))}" for name, m in parts.items()]
    return {
        "name": model.name,
        "ids": model.id_hash(),
        "image": f"{height} × {width} pixels in patches of {image.patch_size}",
        "tokens": f"{config.num_tokens} of {config.num_bits} bits, {rows} × {columns}",
        "bytes_per_image": num_bits // 8,
        "bits_per_pixel": f"{num_bits / (height * width):.4f}",
        "embedding": f"{config.projection_dim} dimensions shared by images and text",
        "text": f"{text.max_position_embeddings} tokens of {text.vocab_size:,} words"
        if model.text_tokenizer
        else "no vocabulary in this folder",
        "parameters": sum(p.numel() for p in model.parameters()),
        "of_which": ", ".join(sizes),
        "vision": f"{image.num_hidden_layers} layers, {image.hidden_size} wide, {image.num_attention_heads} heads",
        "decoder": f"{config.decoder.num_hidden_layers} layers, {config.decoder.hidden_size} wide",
        "logit_scale": f"{model.logit_scale.item():.4f} (× {model.logit_scale.exp().item():.1f})",
    }


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"
