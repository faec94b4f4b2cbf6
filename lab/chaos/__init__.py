"""Kills at random moments: a host and guests of several processes are killed and restarted, and nothing may be lost.

``seats`` start and restart the processes, ``run`` is the loop and what came of it. What is checked is the zones and the
memory objects themselves, through mappings and descriptors of our own.
"""
