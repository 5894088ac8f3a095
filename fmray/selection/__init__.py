"""Task selection: which candidate tasks to finetune on for a target (Algorithm 1, baselines)."""

from fmray.selection.baselines import choose_baseline
from fmray.selection.coverage import Selection, coverage, select_tasks, selected_count, similarity
from fmray.selection.moments import MomentStream, TaskMoments

__all__ = [
    "MomentStream",
    "Selection",
    "TaskMoments",
    "choose_baseline",
    "coverage",
    "select_tasks",
    "selected_count",
    "similarity",
]
