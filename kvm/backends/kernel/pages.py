"""Copying guest pages, without numpy's temporary and without the GIL."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvm.backends.interface import PAGE_SIZE
from kvm.backends.kernel.library import ffi, lib

Pages = NDArray[np.int64]


def copy_pages(to: NDArray[np.uint8], to_pages: Pages | None, source: NDArray[np.uint8], pages: Pages | None) -> None:
    """``to[to_pages] = source[pages]`` for arrays of 4096-byte pages; None counts 0, 1, 2… as far as the other goes.

    Raises IndexError for a page that an array doesn't have; those before it are copied then.
    """
    given = to_pages if to_pages is not None else pages
    count = len(source) if given is None else len(given)
    if to_pages is not None and pages is not None and len(to_pages) != len(pages):
        raise IndexError(f"{len(to_pages)} pages from {len(pages)}")
    done = lib.vd_copy_pages(
        ffi.from_buffer("char[]", to, require_writable=True), _numbers(to_pages), to.nbytes // PAGE_SIZE,
        ffi.from_buffer("char[]", source), _numbers(pages), source.nbytes // PAGE_SIZE,
        count,
    )  # fmt: skip
    if done < count:
        raise IndexError(f"number {done} of the {count} pages to copy is out of range")


def _numbers(pages: Pages | None) -> object:
    return ffi.NULL if pages is None else ffi.from_buffer("int64_t[]", pages)
