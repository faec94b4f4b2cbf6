"""Everybody at once: vCPU threads, attached processes, the reporter at its fastest, a host in every mood."""
