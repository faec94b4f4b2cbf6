"""Tests of the guest side, one folder a part."""
