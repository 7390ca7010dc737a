"""Waiting at a store of torch.distributed, for what another rank has to say."""

import contextlib
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

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
