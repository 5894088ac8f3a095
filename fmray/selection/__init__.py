"""Task selection: moments of tasks, similarity, coverage, Algorithm 1, ablations and peers."""
