"""Guest RAM by content: for every page a number, and the arrays of pages that the numbers point into.

A number holds its source in the bits from ``SOURCE_SHIFT`` on and its place in that source below. Source 0 is the
machine's own store, the others are snapshot files' pages as mapped. Number 0 is the zero page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]
PageArray = NDArray[np.uint8]

ZERO = 0
SOURCE_SHIFT = 40
PLACE_MASK = (1 << SOURCE_SHIFT) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """A guest's RAM at one moment. Nothing in it changes: whoever gives it out keeps its pages in place."""

    index: Index
    sources: Mapping[int, PageArray]

    def read(self, numbers: Index, out: PageArray) -> PageArray:
        """The pages of these numbers, filled into the beginning of ``out`` unless they lie together anyhow."""
        which = numbers >> SOURCE_SHIFT
        places = numbers & PLACE_MASK
        first = int(which[0])
        if (which == first).all():
            start, stop = int(places[0]), int(places[-1]) + 1
            if stop - start == len(places) and (places[1:] == places[:-1] + 1).all():
                return self.sources[first][start:stop]
            return np.take(self.sources[first], places, axis=0, out=out[: len(places)], mode="clip")
        for source in np.unique(which):
            here = np.flatnonzero(which == source)
            out[here] = self.sources[int(source)][places[here]]
        return out[: len(numbers)]
