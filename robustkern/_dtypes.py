"""The dtypes of data, and of sums over them."""

import torch

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over data of this dtype: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
