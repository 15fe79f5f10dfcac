"""Implementations for CPUs: batched PyTorch. "auto" takes them wherever no GPU kernel takes the arguments."""


def unavailable() -> str | None:
    """Why these cannot run here, whatever the arguments: they always can."""
    return None
