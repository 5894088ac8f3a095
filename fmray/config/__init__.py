"""All settings of fmray: typed recipes, one module per kind, and one loader.

`fmray.config.serve` (the endpoint's settings) is imported by itself: it needs torch.
"""

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
from fmray.config.fewshot import FewshotRecipe
from fmray.config.recipes import KINDS, LoadedRecipe, R, load
from fmray.config.search import PlansRecipe, SearchRecipe
from fmray.errors import ConfigError

__all__ = [
    "KINDS",
    "NAME",
    "AdaLlavaRecipe",
    "AdaptiveConfig",
    "BaseRecipe",
    "ClusterConfig",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "FewshotRecipe",
    "LoadedRecipe",
    "Location",
    "LoraConfig",
    "ModelConfig",
    "PlansRecipe",
    "R",
    "ScratchConfig",
    "SearchRecipe",
    "Section",
    "ShapesConfig",
    "Share",
    "TrackingConfig",
    "TrainConfig",
    "ZeroConfig",
    "load",
]
