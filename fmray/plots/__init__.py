"""Figures: each function takes typed values and a path, and writes one image file."""
