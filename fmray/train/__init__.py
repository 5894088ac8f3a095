"""Training and evaluation on Ray Train and DeepSpeed.

Models, ZeRO settings, the loop, checkpoints, the job.
"""
