"""How a device fails: memory that ran out, or a GPU that is lost to the process."""

from __future__ import annotations

SHORTAGE = (
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
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in SHORTAGE)


def why_the_cpu(error: RuntimeError) -> str:
    """Why the CPU must take over what failed with `error` on the GPU; empty if it need not, as it would fail there too."""
    if ran_out_of_memory(error):
        return "the GPU's memory does not hold this scan"
    if str(error).startswith("CUDA error"):  # an illegal access, a memory fault: all later calls of this process fail
        return "the GPU failed, and it will until this process is started again"
    return ""
