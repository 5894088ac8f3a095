"""Search: values of a recipe (kind: search), or the plans of a trained model (kind: plans).

    python jobs/search.py --config jobs/recipes/search_fewshot.yaml --run-id tasks
    python jobs/search.py --config jobs/recipes/search_plans.yaml --run-id plans

Prints a table, and writes `<storage>/<run id>/`: trials.jsonl, report.html and a folder for each
trial; for plans plans.json, answers.jsonl and evaluation/. The same `--run-id` resumes the search.
"""

import sys

from fmray.commands.jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job("search"))
