"""The endpoint: an adaptive model behind an OpenAI-style API, on Ray Serve. Needs no DeepSpeed."""
