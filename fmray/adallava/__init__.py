"""AdaLLaVA: multimodal models that keep a compute budget.

Imports torch and transformers, and no package of the platform.
"""

from fmray.adallava.cost import CostModel
from fmray.adallava.layout import SwitchLayout
from fmray.adallava.model import AdaptiveModel, AdaptiveOutput, AdaptiveVLM
from fmray.adallava.sampling import best_plan, random_plan, sample_plan

__all__ = [
    "AdaptiveModel",
    "AdaptiveOutput",
    "AdaptiveVLM",
    "CostModel",
    "SwitchLayout",
    "best_plan",
    "random_plan",
    "sample_plan",
]
