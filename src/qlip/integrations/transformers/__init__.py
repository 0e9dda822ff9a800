"""QLIP for Hugging Face transformers (extra `transformers`).

    from qlip.integrations.transformers import QLIPImageProcessor, QLIPModel, QLIPVisionModel

Importing this registers them with `AutoConfig`, `AutoModel`, `AutoImageProcessor` and `AutoProcessor` under the
model types `qlip` and `qlip_vision_model`; `clip` stays CLIP's.

Raises:
    InputError: transformers is missing, or of another major version than 5.
"""

from importlib.metadata import PackageNotFoundError, version

from qlip.errors import InputError, MissingExtra

_REMEDY = "pip install 'open-qlip[transformers]'"


def check_version() -> None:
    """Refuse what this does not work with, with an InputError; importing this module does so."""
    try:
        installed = version("transformers")
    except PackageNotFoundError as error:
        raise MissingExtra(
            f"qlip.integrations.transformers needs the library `transformers`: {_REMEDY}"
        ) from error
    if installed.split(".")[0] != "5":
        raise InputError(f"transformers {installed} is installed, this works with 5.x: {_REMEDY}")


check_version()

from transformers import AutoConfig, AutoModel, AutoProcessor  # noqa: E402

# Some versions refuse it at its usual place without torchvision, which it does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # noqa: E402

from qlip.integrations.transformers.export import export  # noqa: E402
from qlip.integrations.transformers.modeling import (  # noqa: E402
    QLIPConfig,
    QLIPDecoderConfig,
    QLIPImageProcessor,
    QLIPModel,
    QLIPProcessor,
    QLIPTextConfig,
    QLIPVisionConfig,
    QLIPVisionModel,
)

__all__ = [
    "QLIPConfig",
    "QLIPDecoderConfig",
    "QLIPImageProcessor",
    "QLIPModel",
    "QLIPProcessor",
    "QLIPTextConfig",
    "QLIPVisionConfig",
    "QLIPVisionModel",
    "export",
]

for _config, _model in ((QLIPConfig, QLIPModel), (QLIPVisionConfig, QLIPVisionModel)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoImageProcessor.register(_config, slow_image_processor_class=QLIPImageProcessor, exist_ok=True)
AutoProcessor.register(QLIPConfig, QLIPProcessor, exist_ok=True)
