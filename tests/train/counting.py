"""What the host reads of tensors, and the collectives that it orders."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result the host waits for.
READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "bincount")


class Counted(TorchDispatchMode):
    """Counts, while it is on, ``reads``, and collectives by their names (``c10d::allreduce_``)."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = function.name()
        if name.split("::")[1].split(".")[0] in READS:
            self.counts["reads"] += 1
        elif name.startswith("c10d::"):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))
