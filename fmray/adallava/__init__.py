"""AdaLLaVA: multimodal models that obey a latency budget. Knows torch and transformers, and no
platform.
"""

from fmray.adallava.cost import CostModel
from fmray.adallava.layout import SwitchLayout
from fmray.adallava.model import AdaptiveOutput, AdaptiveVLM
from fmray.adallava.sampling import best_plan, random_plan, sample_plan

__all__ = [
    "AdaptiveOutput",
    "AdaptiveVLM",
    "CostModel",
    "SwitchLayout",
    "best_plan",
    "random_plan",
    "sample_plan",
]
