"""How many bytes a training sends in a step, before it starts.

In: the stage of ZeRO, the sizes of the model, accumulation passes, ranks. Out: a `Volume`, the
bytes that go through each kind of collective, and what one rank sends of them.

Sources: Rajbhandari et al. 2020 (ZeRO), section 7, for what has to be sent (`least`); DeepSpeed
0.19's code for what it does send (`volume`), which is more for stages 1 and 2; for a ring Patarasu
and Yuan 2009: a rank sends (N - 1) / N of a tensor to reduce-scatter it, as much to all-gather it,
and twice that for an all-reduce, whatever the number of ranks. A test compares `volume` with what
DeepSpeed calls, and `Volume.sent` with a ring that is played through.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Volume:
    """Bytes of whole tensors that each collective handles in one optimizer step."""

    all_reduce: float = 0.0
    reduce_scatter: float = 0.0
    all_gather: float = 0.0

    def sent(self, world_size: int) -> float:
        """Bytes that each of the ranks sends, and receives, around a ring."""
        share = (world_size - 1) / world_size
        return share * (2 * self.all_reduce + self.reduce_scatter + self.all_gather)


def volume(stage: int, trainable: int, frozen: int, width: int, passes: int) -> Volume:
    """What DeepSpeed does in a step of several accumulation passes.

    trainable, frozen: parameters. The frozen ones are a vision tower: gradients do not go through
    them, so that the backward pass does not need them. width: bytes of a parameter and of a
    gradient on its way (`communication_data_type` is the model's).

    Stages 0 and 1 reduce the gradients once a step, 2 and 3 after each pass. Stages 1 and 2
    all-reduce them (`use_multi_rank_bucket_allreduce`, on by default, goes before
    `reduce_scatter`), although each rank keeps its part only, and then gather what was updated.
    Stage 3 gathers what a pass needs, forward and backward, and reduce-scatters.

    Left out: scalars (losses, norms); of stage 3 that parameters below `parameter_persistence` stay
    whole and are gathered once a step, and that those which are used again within 1e9 parameters
    (`stage3_max_reuse_distance`) are not gathered again: between the forward and the backward pass
    the last layers, and all of a model smaller than a third of that.
    """
    learned = float(trainable * width)
    if stage == 0:
        return Volume(all_reduce=learned)
    if stage == 1:
        return Volume(all_reduce=learned, all_gather=learned)
    if stage == 2:
        return Volume(all_reduce=passes * learned, all_gather=learned)
    assert stage == 3, stage
    gathered = 2 * learned + frozen * width
    return Volume(reduce_scatter=passes * learned, all_gather=passes * gathered)


def least(stage: int, trainable: int, frozen: int, width: int, passes: int) -> Volume:
    """What the paper's stages have to send: gradients are reduce-scattered where they are split.

    Stage 2 needs that after each pass, for it keeps no more than its part of them.
    """
    learned = float(trainable * width)
    if stage in (0, 3):
        return volume(stage, trainable, frozen, width, passes)
    reductions = passes if stage == 2 else 1
    return Volume(reduce_scatter=reductions * learned, all_gather=learned)
