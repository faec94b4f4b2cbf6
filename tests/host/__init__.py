"""Tests of the host, against hand-written guests."""
