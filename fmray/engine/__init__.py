"""The adaptive engine: continuous batching of requests that each run their own plan. Knows torch
and the adaptive model, and no platform.
"""

from fmray.engine.engine import Engine
from fmray.engine.requests import EngineStats, Event, Request, Result, Sampling, StepTiming

__all__ = ["Engine", "EngineStats", "Event", "Request", "Result", "Sampling", "StepTiming"]
