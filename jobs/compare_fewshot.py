"""The previous name of `jobs/compare.py`; goes with the next release."""

import sys

from fmray.commands.jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job("compare", old_name="compare_fewshot.py"))
