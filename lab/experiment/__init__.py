"""Experiments: what one run is, what is measured in it, where it runs, and where its results are kept."""
