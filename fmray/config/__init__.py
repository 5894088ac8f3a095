"""Every setting of fmray: typed recipes, one module per kind, and one way to load them."""

from fmray.config.adallava import (
    AdaLlavaRecipe,
    AdaptiveConfig,
    DataConfig,
    EvaluateConfig,
    LoraConfig,
    ModelConfig,
    ScratchConfig,
    ShapesConfig,
    TrainConfig,
    ZeroConfig,
)
from fmray.config.base import (
    NAME,
    BaseRecipe,
    ClusterConfig,
    Location,
    Section,
    Share,
    TrackingConfig,
)
from fmray.config.recipes import LoadedRecipe, R, load
from fmray.errors import ConfigError

__all__ = [
    "NAME",
    "AdaLlavaRecipe",
    "AdaptiveConfig",
    "BaseRecipe",
    "ClusterConfig",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "LoadedRecipe",
    "Location",
    "LoraConfig",
    "ModelConfig",
    "R",
    "ScratchConfig",
    "Section",
    "ShapesConfig",
    "Share",
    "TrackingConfig",
    "TrainConfig",
    "ZeroConfig",
    "load",
]
