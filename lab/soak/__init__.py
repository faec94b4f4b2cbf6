"""A long run of everything at once: what takes part, who looks at it, and what must hold at the end.

``cast`` says who takes part, ``stage`` starts and stops them, ``attached`` is what runs beside a guest on its zone,
``census`` and ``flat`` look at the memory of processes, ``watch`` at zones, ``soak`` brings it together and ``verdict``
decides. Nothing here knows how an allocator or a policy works: it looks from outside, as an operator would.
"""
