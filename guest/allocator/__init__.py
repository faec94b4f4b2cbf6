"""A zone as Linux has it: buddy free lists, fallback, isolation, watermarks, per-CPU lists, shuffling.

Kernels from the bottom up: ``view``, ``lists``, ``shuffle``, ``buddy``, ``pageblocks``, ``repair``, ``locked``,
``percpu``, ``validate``, ``entry``. ``zone`` is the readable face. Reporting is not here, but for the marks that the
list helpers must keep (flag, counters, boundary) and the question whether a run is due.
"""
