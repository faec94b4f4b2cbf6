"""The commands of ``python -m lab``, a module each: flags, checks, and a call. The work itself is elsewhere in ``lab``.

Each has ``add_arguments(parser)`` and ``run(namespace)``. None loads NumPy, Numba, SciPy, rich or Matplotlib before
its flags have been read and found good.
"""
