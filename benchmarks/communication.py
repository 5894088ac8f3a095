"""Bytes that training sends in a step, computed from the ZeRO stage and the sizes of the model.

`least` is what has to be sent: Rajbhandari et al. 2020 (ZeRO), section 7. `volume` is what
DeepSpeed 0.19 sends according to its code, which is more for stages 1 and 2. `Volume.sent` assumes
a ring (Patarasu and Yuan 2009): a rank sends (N - 1) / N of a tensor to reduce-scatter it, as much
to all-gather it, and twice that for an all-reduce, whatever the number of ranks N. A test compares
`volume` with the collectives that DeepSpeed calls, and `Volume.sent` with a simulated ring.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Volume:
    """Bytes of complete tensors that each collective handles in one optimizer step."""

    all_reduce: float = 0.0
    reduce_scatter: float = 0.0
    all_gather: float = 0.0

    def sent(self, world_size: int) -> float:
        """Return the bytes that each rank sends, and receives, around a ring."""
        share = (world_size - 1) / world_size
        return share * (2 * self.all_reduce + self.reduce_scatter + self.all_gather)


def volume(stage: int, trainable: int, frozen: int, width: int, passes: int) -> Volume:
    """Return what DeepSpeed sends in a step.

    Stages 0 and 1 reduce the gradients once per step, 2 and 3 after each pass. Stages 1 and 2
    all-reduce them (`use_multi_rank_bucket_allreduce`, on by default, takes precedence over
    `reduce_scatter`), although each rank keeps only its part, and then gather the updated
    parameters. Stage 3 gathers what a pass needs, forward and backward, and reduce-scatters.

    Left out: scalars (losses, norms); in stage 3 also two savings. Parameters below
    `parameter_persistence` are not partitioned and are gathered once per step, and parameters that
    are used again within 1e9 parameters (`stage3_max_reuse_distance`) are not gathered again: the
    last layers between the forward and the backward pass, and all layers of a model smaller than a
    third of that.

    Args:
        trainable: parameters that learn.
        frozen: parameters of the vision tower; gradients do not pass through them, so the backward
            pass does not need them.
        width: bytes of a parameter and of a gradient that is sent (`communication_data_type` is
            the model's).
        passes: accumulation passes.
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
    """Return what the stages of the paper have to send; `Args:` as for `volume`.

    Partitioned gradients are reduce-scattered, in stage 2 after each pass, since a rank keeps only
    its part of them.
    """
    learned = float(trainable * width)
    if stage in (0, 3):
        return volume(stage, trainable, frozen, width, passes)
    reductions = passes if stage == 2 else 1
    return Volume(reduce_scatter=reductions * learned, all_gather=learned)
