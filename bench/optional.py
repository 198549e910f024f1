"""Packages that need not be there."""

import functools
import importlib
import warnings


@functools.cache
def why_not(module: str, install: str) -> str | None:
    """Why a module cannot be imported, and what would install it; None if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages that look for CUDA
            importlib.import_module(module)
    except ImportError as error:
        return f"not installed: {error} ({install})"
    return None
