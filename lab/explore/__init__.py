"""Every interleaving: the production kernels on a zone of a few pages, from every state that can be reached.

Actors step by critical sections: two vCPUs, the reporter, a host, and compaction. A state is the bytes of the segment
that mean something, what each actor has in hand, and what each page holds. After each step the contract is checked.
"""
