"""Tests, by package; tests that hold an invariant carry its identifier."""
