"""The memory of tensors, counted by their storages: what several tensors share counts once."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def stored(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Storage -> its bytes."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return {storage._cdata: storage.nbytes() for storage in storages}


class Tracker(TorchDispatchMode):
    """Bytes of the tensors that operations make, while they live.

    Attributes:
        live: now.
        peak: at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        made = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return made

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now on."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._known or not storage.nbytes():
            return
        self._known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of these tensors never."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known.add(storage._cdata)
            weakref.finalize(storage, self._known.discard, storage._cdata)

    def _forget(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.live -= size
