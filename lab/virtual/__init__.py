"""Virtual time: the live kernels and cycle, driven by a clock that counts what each of their steps costs.

``costs`` is what things cost and ``calibrate`` measures it; ``clock`` shares processors among those who work; ``lock``
is who holds the zone lock and who waits for it; ``vcpu``, ``reporter``, ``host`` and ``populate`` are the actors;
``machine`` puts a guest together, ``account`` and ``oracle`` keep its books, ``run`` turns them into a result. Nothing
here reads a clock or draws a random number, but for ``calibrate``.
"""
