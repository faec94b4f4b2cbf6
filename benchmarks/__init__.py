"""Benchmarks: figures that stand beside what they are compared with, from one run. ``python -m benchmarks``."""
