"""Advice from a recording: many settings replayed, what each returns and costs, and which one to set."""
