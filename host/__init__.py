"""The host: one process that takes the reports of many guests and gives their memory back to the operating system.

It never maps guest memory, never opens a guest's page metadata and never trusts a number that a guest sends. What lives
here: the registry of guests, the event loop, checking and accounting of reports, the discard backends with their proof.
What does not: anything that a guest needs to run, and any allocator.
"""
