"""The name that a shared host holds; apart, so that whoever looks for it need not load compiled code."""

from __future__ import annotations

__all__ = ["lock_object"]


def lock_object(lab: str) -> str:
    """Shared memory: held by the live host of this kind. It cannot be a guest's: those have one part more."""
    return f"/fpr.{lab}.shared-host"
