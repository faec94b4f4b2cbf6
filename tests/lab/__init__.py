"""Tests of the demo: page maps, samples, processes, picture, result."""
