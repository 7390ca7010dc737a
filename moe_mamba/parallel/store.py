"""Waiting at a store of torch.distributed for what another rank has to say, and reading it.

The store asks nobody who he is: whoever reaches its port may write there, so what is read is checked.
"""

import contextlib
import functools
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError

from moe_mamba.errors import UserError

# Seconds of a wait of torch's own, which is answered at once; one that is in vain leaves two lines in the log.
AT_ONCE = 1.0
SECONDS_BETWEEN_LOOKS = 0.5


def wait_for_keys(store: dist.Store, keys: Sequence[str], seconds: float) -> bool:
    """Whether all `keys` are set within some time; signals are heard meanwhile.

    Raises:
        torch.distributed.DistNetworkError: the store's server is gone.
    """
    deadline = time.monotonic() + seconds
    with contextlib.suppress(dist.DistStoreError):
        store.wait(list(keys), timedelta(seconds=min(AT_ONCE, seconds)))
        return True
    while not store.check(list(keys)):
        if time.monotonic() > deadline:
            return False
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return True


def read_key(store: dist.Store, key: str, kind: Any) -> Any:
    """The value of a key that is set, as JSON of some type.

    Args:
        store: of torch.distributed.
        key: of it.
        kind: a type that pydantic knows.

    Raises:
        UserError: it is of another type.
        torch.distributed.DistNetworkError: the store's server is gone.
    """
    return checked(store.get(key), kind)


@functools.cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """What checks values of a type, made once: that takes longer than a hundred values do, and rank 0 reads of all."""
    return TypeAdapter(kind)


def checked(value: bytes, kind: Any) -> Any:
    """JSON of some type, from a store.

    Raises:
        UserError: it is of another type.
    """
    try:
        return adapter(kind).validate_json(value)
    except ValidationError:
        raise UserError(
            "what the ranks tell each other at MASTER_ADDR and MASTER_PORT was overwritten, by another job or program: "
            "give this job a port of its own (MASTER_PORT, or the launcher's --master_port)"
        ) from None
