"""Hosts and guests as processes, as a user starts them: real queues, real memory, real signals."""
