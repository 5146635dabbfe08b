"""What ranks tell each other without waiting: numbers in the store of their process group."""

import itertools

import torch.distributed as dist


class SharedSet:
    """A set of whole numbers that any rank adds to at any time. Every rank must make as many, in the same order."""

    _made = itertools.count()

    def __init__(self):
        store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else dist.HashStore()
        self._store = dist.PrefixStore(f"shared_set/{next(self._made)}", store)

    def add(self, number):
        if self._store.add(f"has/{number}", 1) == 1:  # the first rank to say so
            place = self._store.add("count", 1)
            self._store.set(f"at/{place}", str(number))

    def __len__(self):
        return self._store.add("count", 0)

    def since(self, place):
        """The numbers after the first `place` ones, in the order in which they came."""
        return [int(self._store.get(f"at/{n}")) for n in range(place + 1, len(self) + 1)]
