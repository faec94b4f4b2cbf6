"""What this machine allows, held against what a lab needs: one limit a row, with the command that mends it.

``limit`` is a row, ``machine`` reads the files it comes from (and may be pointed at another root), ``shared_memory``,
``queues``, ``process``, ``memory`` and ``platform`` each know some limits, ``leftovers`` what dead runs have left,
``view`` shows all of it. Nothing here changes anything but ``leftovers.clean``.
"""
