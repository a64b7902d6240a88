"""How a device fails: out of memory, or a GPU that the process can no longer use."""

from __future__ import annotations

SHORTAGE = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "alloc_failed",  # cuFFT, cuBLAS, cuSOLVER and cuDNN
    "status_not_initialized",  # cuBLAS and cuDNN, where there is no memory for their handle
    "unable to find an engine",  # cuDNN, where no algorithm's workspace fits
)
LIBRARIES = ("cudnn", "cufft", "cusolver", "nvrtc", "cuda driver")  # of the GPU: the CPU uses none of them
GPU_LOST = "the GPU failed and cannot be used until this process is restarted"


class GpuHangs(RuntimeError):
    """The GPU does not respond; any further call to it would hang too."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether GPU or host memory was exhausted (torch and the CUDA libraries report this in several ways)."""
    # torch's class, by name: torch may not be imported.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in SHORTAGE)


def lost_the_gpu(error: BaseException) -> bool:
    """Whether every further GPU call of this process will fail.

    That is after an illegal access, a memory fault, or with a GPU that fell off the bus or hangs.
    """
    if isinstance(error, GpuHangs):
        return True
    of_cuda = isinstance(error, RuntimeError) and str(error).startswith("CUDA error")
    return of_cuda and not ran_out_of_memory(error)


def why_the_cpu(error: RuntimeError) -> str:
    """Why the CPU must take over what failed on the GPU with `error`; empty if it would fail on the CPU too."""
    if ran_out_of_memory(error):
        return "the GPU's memory does not hold this scan"
    if lost_the_gpu(error):
        return GPU_LOST
    if any(name in str(error).lower() for name in LIBRARIES):
        return "a library of the GPU failed"
    return ""
