"""The previous name of `jobs/search.py`; goes with the next release."""

import sys

from fmray.commands.jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job("search", old_name="search_plans.py"))
