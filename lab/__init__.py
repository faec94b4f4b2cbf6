"""Experiments over both sides: the demo's processes, samples, picture and result.

Here lives what starts guests and hosts, watches them from outside and draws what it saw. What allocates, reports or
discards does not: that is ``guest`` and ``host``, which know nothing of this package.
"""
