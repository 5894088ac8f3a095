"""The previous name of `jobs/train.py`; goes with the next release."""

import sys

from fmray.commands.jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job("train", old_name="train_adallava.py"))
