"""Compare ways to adapt an encoder: target x method x task selection, with paired intervals.

    python jobs/compare.py --config jobs/recipes/fewshot_small.yaml --run-id table

Makes the image store and pretrains the encoder first where they are missing. Prints the table, and
writes `<storage>/<run id>/`: results.json, tasks.parquet, comparison.png. The same `--run-id`
computes only the cells that are missing.
"""

import sys

from fmray.commands.jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job("compare"))
