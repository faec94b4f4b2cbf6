"""Recordings of a real kernel's page events: reading their text, how far to believe them, and keeping them in columns."""
