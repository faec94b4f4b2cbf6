"""The guest: a page allocator over shared memory, free page reporting, and workloads.

``allocator`` is the zone, ``reporting`` the cycle and its thread, ``workloads`` what the vCPUs do, ``memory`` the RAM
itself, ``machine`` all of it put together. Nothing here knows how a host discards; ``host`` is never imported.
"""
