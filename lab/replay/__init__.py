"""Replay of a recorded guest: its pages move as they did, and a policy of ours reports what is free."""
