"""What jobs run on: Ray cluster, placement, nodes, MLflow, files, the log of a run."""
