"""Adaptive inference engine: continuous batching, load control and fairness between callers.

Uses torch and the adaptive model only, no platform package.
"""

from fmray.engine.engine import Engine
from fmray.engine.requests import EngineStats, Event, Request, Result, Sampling, StepTiming

__all__ = ["Engine", "EngineStats", "Event", "Request", "Result", "Sampling", "StepTiming"]
