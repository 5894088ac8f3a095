"""fmray: foundation models adapted to a job and a compute budget, on Ray.

Importing this package imports nothing heavy; the rooms are described in the README.
"""

__version__ = "0.1.0"
