"""What vCPUs do: one kernel a module over the primitives of ``engine``, and the thread that runs them in ``vcpu``."""
