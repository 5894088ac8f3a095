"""Pretrain a small image encoder from scratch: SimCLR, MoCo, or supervised.

    python jobs/pretrain.py --config jobs/recipes/fewshot_small.yaml --run-id small

Writes `<storage>/<run id>/model`, a directory for `encoder.checkpoint`. The same `--run-id` resumes
the run.
"""

import sys

from fmray.commands.jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job("pretrain"))
