"""Packed forms of weights that belong to somebody else, kept between calls."""

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lamina import _C

Packed = TypeVar("Packed")


class _Entry(NamedTuple):
    stamp: tuple
    storages: list[StorageWeakRef]
    packed: object


class PackedCache(Generic[Packed]):
    """What `pack` gave last time for the same tensors, form and content.

    A change is noticed by torch's version counter, and by a fingerprint of some elements where it is bypassed
    (`parameter.data`). An entry is good only while all its storages live: they are held weakly, and a weakly held
    storage keeps its identity, so that a new tensor at an old address is never taken for the old one.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, tensors: Sequence[Tensor], form: Hashable, pack: Callable[[], Packed]) -> Packed:
        """`form`: everything else that the packed weights hang on, shapes among it."""
        if not tensors or any(t.is_inference() for t in tensors):  # inference tensors have no version counter
            return pack()
        places = [(t.untyped_storage()._cdata, t.data_ptr(), t._version) for t in tensors]
        stamp = (places, _C.weight_fingerprint(tensors))
        key = (*places[0][:2], form)
        entry = self._entries.get(key)
        if entry is not None and entry.stamp == stamp:
            return entry.packed
        packed = pack()
        for old in [k for k, e in list(self._entries.items()) if any(s.expired() for s in e.storages)]:
            self._entries.pop(old, None)
        self._entries[key] = _Entry(stamp, [StorageWeakRef(t.untyped_storage()) for t in tensors], packed)
        return packed
