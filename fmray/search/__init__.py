"""Searches on Ray Tune: which tasks to train on, and where on the accuracy-compute curve to
live."""
