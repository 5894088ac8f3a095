"""Task selection: which of the tasks at hand help a target. Knows numpy and scipy, no platform."""

from fmray.selection.algorithm import Selection, select_tasks, selected_count
from fmray.selection.coverage import coverage, similarity
from fmray.selection.moments import MomentStream, TaskMoments
from fmray.selection.peers import choose_peer

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
