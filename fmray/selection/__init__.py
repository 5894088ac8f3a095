"""Task selection: which of the tasks at hand help a target. Knows numpy and scipy, no platform."""

from fmray.selection.baselines import choose_peer
from fmray.selection.coverage import Selection, coverage, select_tasks, selected_count, similarity
from fmray.selection.moments import MomentStream, TaskMoments

__all__ = [
    "MomentStream",
    "Selection",
    "TaskMoments",
    "choose_peer",
    "coverage",
    "select_tasks",
    "selected_count",
    "similarity",
]
