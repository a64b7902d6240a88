"""How a device fails: memory that ran out, or a GPU that is lost to the process."""

from __future__ import annotations

SHORTAGE = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "alloc_failed",  # cuFFT, cuBLAS, cuSOLVER and cuDNN
    "status_not_initialized",  # cuBLAS and cuDNN, where their handle finds no room
    "unable to find an engine",  # cuDNN, where no algorithm's workspace fits
)
GPU_LOST = "the GPU failed and cannot be used until this process is restarted"


class GpuHangs(RuntimeError):
    """The GPU does not answer; whatever else is asked of it waits too."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU's or the host's memory was exhausted (torch and CUDA's libraries say so in several ways)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in SHORTAGE)


def lost_the_gpu(error: BaseException) -> bool:
    """Whether no later call of this process to the GPU will succeed: an illegal access, a memory fault, a GPU off the bus or one that hangs."""
    return isinstance(error, GpuHangs) or isinstance(error, RuntimeError) and str(error).startswith("CUDA error") and not ran_out_of_memory(error)


def why_the_cpu(error: RuntimeError) -> str:
    """Why the CPU must take over what failed with `error` on the GPU; empty if it need not, as it would fail there too."""
    if ran_out_of_memory(error):
        return "the GPU's memory does not hold this scan"
    if lost_the_gpu(error):
        return GPU_LOST
    return ""
