"""The adaptive engine: continuous batching of requests that run different plans (no Ray inside)."""
