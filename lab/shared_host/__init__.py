"""A host that its guests trust (HyperAlloc's idea): it maps their zones and claims free blocks itself, without a queue.

It is a program of its own, in ``lab``, since it needs both sides: the ordinary host never maps what belongs to a guest,
and ``guest`` and ``host`` never import each other. Only guests that were started with ``--policy shared`` let it in.
"""
