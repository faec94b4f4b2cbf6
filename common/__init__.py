"""What guest and host must agree on: geometry, names, layout, locks, messages, queues, settings, errors, statistics.

Imports neither side. ``native`` is the only place that knows how Python is compiled.
"""
