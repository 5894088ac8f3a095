"""The previous name of `jobs/pretrain.py`; goes with the next release."""

import sys

from fmray.commands.jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job("pretrain", old_name="pretrain_encoder.py"))
