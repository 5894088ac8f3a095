"""Training and evaluation on Ray Train and DeepSpeed: models, ZeRO settings, the loop, checkpoints, the job."""
