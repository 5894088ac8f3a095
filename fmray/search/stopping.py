"""Which trials are stopped early: Ray's ASHA or median rule, with a memory of earlier trials.

In: a search's `scheduler` section, the evaluations of a trial, and the trials that ended before
this process began. Out: a scheduler for Ray Tune. Ray's own know only what they saw themselves, so
a search that goes on would be lenient again with every restart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from fmray.search.config import SearchRecipe
from fmray.search.state import Finished


def make_scheduler(
    recipe: SearchRecipe, every: int, steps: int, finished: Sequence[Finished]
) -> TrialScheduler:
    """The scheduler that a recipe names.

    Args:
        every, steps: of a trial's evaluations, in the base recipe.
        finished: in the order they ended; their curves count as if they had just been seen.
    """
    config, [objective, *_] = recipe.scheduler, recipe.objectives
    if config.kind == "none":
        return FIFOScheduler()
    grace = min(config.grace * every, steps)
    judged = {"time_attr": "step", "metric": objective.metric, "mode": objective.mode}
    if config.kind == "median":
        # it would pause a trial for others that wait, and a paused one begins again
        rule = MedianStoppingRule(grace_period=grace, min_time_slice=math.inf, **judged)
    else:
        rule = AsyncHyperBandScheduler(
            grace_period=grace, max_t=steps, reduction_factor=config.reduction, **judged
        )
    for earlier in finished:
        trial = Trial("earlier", stub=True)
        rule.on_trial_add(None, trial)
        for point in earlier.curve:
            rule.on_trial_result(None, trial, dict(point))
    return rule
