"""fmray: adapts foundation models to a task and a compute budget, and serves them, on Ray.

Importing this package imports nothing heavy. README.md describes the packages.
"""

__version__ = "0.1.0"
