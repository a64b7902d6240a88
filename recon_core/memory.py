"""When memory runs out: how it is recognised."""

from __future__ import annotations

WORDS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "alloc_failed",  # cuFFT, cuBLAS, cuSOLVER and cuDNN
    "unable to find an engine",  # cuDNN, where no algorithm's workspace fits
)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU's or the host's memory was exhausted (torch and CUDA's libraries say so in several ways)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in WORDS)
