"""Free page reporting: policies, the cycle that drives them, the thread around it and the link to a host.

A policy is a module (``boundary``) and an entry in ``table``. ``cycle`` needs neither thread, queue nor clock.
"""
