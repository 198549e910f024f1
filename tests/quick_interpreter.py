"""Triton's interpreter without what it does again in every call of a function within a kernel.

It puts its own functions in the place of those of `tl` for a launch, and once more whenever one
jitted function calls another: by looking through all members of the modules, a third of the time.
"""

from importlib.util import find_spec
from typing import Any


def install() -> None:
    """Patch a module only if it is not patched yet. No Triton, nothing to do."""
    if find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    real = interpreter._patch_lang

    def patch_lang(fn: Any) -> Any:
        modules = [m for m in (tl, tl.core) if any(m is value for value in fn.__globals__.values())]
        if modules and all(m.static_range.__name__ == "_new_range" for m in modules):
            return interpreter._LangPatchScope()
        return real(fn)

    interpreter._patch_lang = patch_lang
