"""Memory that ran out: known by its many names, and given back before the work is tried again in smaller
pieces.
"""

from __future__ import annotations

import gc

import torch

WORDS = (
    "out of memory",  # CUDA's own errors, cuBLAS's and bitsandbytes' among them
    "out_of_memory",  # oneDNN's status
    "can't allocate memory",  # torch's allocator on Linux and macOS
    "not enough memory",  # the same on Windows
    "cannot allocate memory",  # the system's ENOMEM, wherever it comes through
    "bad_alloc",  # C++
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED
    "cudaerrormemoryallocation",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's own type for it is only what a card's caching
    allocator raises.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in WORDS)


def give_back_memory() -> None:
    """Free what a failed attempt left. Call it outside the error's handler: a traceback holds tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
