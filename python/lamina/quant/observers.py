"""Observers: from the values a layer sees to one symmetric int8 scale, chunk by chunk and in bounded memory.

The histogram has bins of relative width 2^-8: the upper bits of a float32 are the number of its bin. They need no range
in advance and no rebinning when the range grows, so the result does not depend on how the data is cut into chunks.
"""

import math

import torch
from torch import Tensor

# Below this, 127 / range overflows: the same bound as in the quantization of rows.
SMALLEST_RANGE = 1e-36

_MANTISSA_BITS = 8
_BINS_PER_OCTAVE = 1 << _MANTISSA_BITS
_SHIFT = 23 - _MANTISSA_BITS
# Values below 2^-24 of the largest are counted as zero: no int8 code can tell them from it.
_OCTAVES = 24
_BINS = _OCTAVES * _BINS_PER_OCTAVE


class Observer:
    """Sees tensors through `update`, then gives the `scale`. Subclasses say in `clip` where the codes should end."""

    def __init__(self) -> None:
        self.largest = 0.0
        self.calls = 0
        self.seen = 0
        self.finite = True

    def update(self, x: Tensor) -> None:
        """Takes in every value of `x`, floating point of any shape and strides."""
        self.calls += 1
        if not x.numel():
            return
        x = x.detach().to(torch.float32)
        low, high = torch.aminmax(x)  # NaN in x makes both NaN
        largest = max(abs(low.item()), abs(high.item()))
        self.seen += x.numel()
        self.finite = self.finite and math.isfinite(largest)
        if self.finite:
            self.largest = max(self.largest, largest)
            self._count(x)

    def _count(self, x: Tensor) -> None:
        """For observers that need more than the largest value; `x` is float32 and finite."""

    def clip(self) -> float:
        """The absolute value that gets code 127."""
        return self.largest

    def scale(self) -> float:
        """The step of the int8 codes: x is about code * scale.

        Raises ValueError if nothing was seen, if all was zero, or if NaN or infinity was among it.
        """
        if not self.seen:
            raise ValueError("no values were observed, so there is no range")
        if not self.finite:
            raise ValueError("NaN or infinity was observed, so there is no range")
        clip = self.clip() if self.largest >= SMALLEST_RANGE else 0.0
        if clip < SMALLEST_RANGE:
            raise ValueError("only zeros were observed, so there is no range")
        return clip / 127.0


class MinMaxObserver(Observer):
    """The largest absolute value gets code 127: nothing is clipped.

    >>> observer = MinMaxObserver(); observer.update(x); observer.scale()
    """


class _HistogramObserver(Observer):
    """Counts of |x| per bin and, where a subclass asks for them, sums and sums of squares, in the 24 octaves below the
    largest value.
    """

    _moments = False

    def __init__(self) -> None:
        super().__init__()
        self._first = 0  # number of the lowest bin that is kept
        self._below = 0  # how many values, zeros among them, lie under it
        self._counts = torch.zeros(_BINS, dtype=torch.int64)
        self._sums = torch.zeros(2 if self._moments else 0, _BINS, dtype=torch.float64)

    def _count(self, x: Tensor) -> None:
        magnitude = x.abs().flatten()
        bins = magnitude.view(torch.int32) >> _SHIFT
        self._grow(int(bins.max()))
        bins -= self._first
        inside = bins >= 0
        if not bool(inside.all()):
            bins, magnitude = bins[inside], magnitude[inside]
        self._below += x.numel() - bins.numel()
        self._counts += torch.bincount(bins, minlength=_BINS)
        if self._moments:
            values = magnitude.double()
            self._sums[0] += torch.bincount(bins, values, minlength=_BINS)
            self._sums[1] += torch.bincount(bins, values.square(), minlength=_BINS)

    def _grow(self, highest: int) -> None:
        """Moves the bins up, by whole octaves, until `highest` is among them."""
        first = max(0, (highest // _BINS_PER_OCTAVE + 1 - _OCTAVES) * _BINS_PER_OCTAVE)
        if first <= self._first:
            return
        dropped = min(first - self._first, _BINS)
        self._below += int(self._counts[:dropped].sum())
        for kept in (self._counts, *self._sums):
            kept[: _BINS - dropped] = kept[dropped:].clone()
            kept[_BINS - dropped :] = 0
        self._first = first

    def _edges(self) -> Tensor:
        """Lower edge of each bin and the upper one of the last, float64 [bins + 1]."""
        numbers = torch.arange(self._first, self._first + _BINS + 1, dtype=torch.int32)
        return (numbers << _SHIFT).view(torch.float32).double()


class PercentileObserver(_HistogramObserver):
    """`percentile` percent of the values, by magnitude, fit into the codes; the rest is clipped.

    For activations with a few wild values; 99.9 to 99.999 are usual. Within 0.4% of the exact percentile.

    >>> observer = PercentileObserver(99.99); observer.update(x); observer.scale()
    """

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        check_observer("percentile", percentile)
        self.percentile = percentile

    def clip(self) -> float:
        if self.percentile == 100.0:
            return self.largest
        rank = self.percentile / 100.0 * self.seen - self._below
        if rank <= 0.0:
            return 0.0
        reached = self._counts.cumsum(0)
        index = min(int(torch.searchsorted(reached, torch.tensor(rank, dtype=torch.float64))), _BINS - 1)
        within = 1.0 - (reached[index].item() - rank) / max(self._counts[index].item(), 1)
        low, high = self._edges()[index : index + 2].tolist()
        return min(low + within * (high - low), self.largest)


class MSEObserver(_HistogramObserver):
    """The clipping point with the least squared error between the values and what their codes stand for.

    Clipping costs the few values beyond it and makes the steps of all others smaller; this is where the sum is least
    (as in Banner et al. 2019, arXiv:1810.05723, but on the values themselves instead of a fitted distribution).

    >>> observer = MSEObserver(); observer.update(x); observer.scale()
    """

    _moments = True

    def clip(self) -> float:
        used = self._counts > 0
        counts = self._counts[used].double()
        mean, square = self._sums[:, used] / counts
        # Two points per bin with its mean and its variance: exact where all its values are one.
        spread = (square - mean.square()).clamp_(min=0.0).sqrt()
        points = torch.cat((mean - spread, mean + spread))
        weights = torch.cat((counts, counts))
        # Coarse, eight points an octave, then fine around the best: the error has several shallow valleys.
        exponents = torch.arange(0, 16 * 8, dtype=torch.float64) / 8
        best = self._best(points, weights, exponents)
        fine = torch.arange(-16, 17, dtype=torch.float64) / 128
        best = self._best(points, weights, (best + fine).clamp(min=0.0))
        return self.largest * 2.0**-best

    def _best(self, points: Tensor, weights: Tensor, exponents: Tensor) -> float:
        errors = []
        for exponent in exponents.tolist():
            scale = self.largest * 2.0**-exponent / 127.0
            codes = torch.round(points / scale).clamp_(max=127.0)
            errors.append((points - codes * scale).square() @ weights)
        return exponents[int(torch.stack(errors).argmin())].item()


OBSERVERS = {"minmax": MinMaxObserver, "percentile": PercentileObserver, "mse": MSEObserver}


def check_observer(name: str, percentile: float) -> None:
    """Raises ValueError for an observer that does not exist and a percentile that is none."""
    if name not in OBSERVERS:
        raise ValueError(f"observer '{name}' is unknown; use one of {', '.join(OBSERVERS)}")
    if not 0.0 < percentile <= 100.0:
        raise ValueError(f"percentile is {percentile}, but must be above 0 and at most 100")


def make_observer(name: str = "minmax", percentile: float = 99.99) -> Observer:
    """A fresh observer by name: "minmax", "percentile" or "mse"."""
    check_observer(name, percentile)
    return PercentileObserver(percentile) if name == "percentile" else OBSERVERS[name]()
