"""A guest whose user may have no message queue: ``main`` is called in a child of a nursery."""

from __future__ import annotations

import resource

from guest import cli

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Exit code of the guest."""
    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (100, 100))
    return cli.main(arguments)
