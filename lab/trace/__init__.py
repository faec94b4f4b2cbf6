"""Recordings of a real kernel's page events: reading the text, how far to believe it, and keeping it in columns."""
