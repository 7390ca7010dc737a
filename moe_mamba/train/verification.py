"""The corpora read whole and compared with their checksums, so that no rank waits for it.

A small corpus is read by rank 0 before the world is joined: what is damaged is refused before anything began. A large
one takes hours at the speed of one process and its disk, in which every other rank would wait at the door. So all ranks
share its files, each reads its own in a thread beside the first steps, and the first checkpoint is written only when
all are done: nothing that was trained on a damaged corpus is kept. What was read once is remembered.
"""

import threading
from collections.abc import Callable

from moe_mamba.data.verification import Remembered, Stamp, compare
from moe_mamba.errors import UserError
from moe_mamba.parallel.distributed import from_all
from moe_mamba.parallel.topology import World
from moe_mamba.run.folder import RunFolder
from moe_mamba.train.corpora import Corpora

AT_ONCE = 1 << 30  # bytes: about a second of SHA-256


def verify_at_once(corpora: Corpora, folder: RunFolder, say: Callable[[str], None]) -> bool:
    """Read what is not remembered, where that is little; whether nothing is left to read.

    Raises:
        UserError: a file is damaged.
    """
    remembered = Remembered(folder.checksums)
    pending = remembered.pending(corpora.content_checks)
    size = sum(check.size for check in pending)
    if size > AT_ONCE:
        say(f"verify    {len(pending):,} files of {size / 2**30:,.1f} GiB are compared with their checksums meanwhile")
        return False
    if pending:
        remembered.add([compare(check) for check in pending])
    return True


class Verification:
    """Reads this rank's share of the corpora in a thread; `finish` waits for all ranks' and refuses what is damaged.

    Args:
        corpora: to read.
        folder: of the run, where it is remembered what was read.
        world: whose ranks share the files.
    """

    def __init__(self, corpora: Corpora, folder: RunFolder, world: World) -> None:
        self._remembered = Remembered(folder.checksums)
        # Sliced before what is remembered is left out: a memory that ranks see differently leaves no file to nobody.
        self._checks = self._remembered.pending(corpora.content_checks[world.rank :: world.size])
        self._is_first, self._is_finished = world.is_first, False
        self._passed: list[tuple[str, str, Stamp]] = []
        self._fault: str | None = None
        # A daemon, so that a run that ends for another reason does not wait for it.
        self._thread = threading.Thread(target=self._read, name="verification", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until every rank has read its share; every rank calls it before a checkpoint, and the first call waits.

        Raises:
            UserError: a file is damaged; the same line on all ranks.
        """
        if self._is_finished:
            return
        self._thread.join()
        ranks = from_all((self._fault, self._passed))
        self._is_finished = True
        if self._is_first:
            self._remembered.add([passed for _, share in ranks for passed in share])
        for fault, _ in ranks:
            if fault is not None:
                raise UserError(fault)

    def _read(self) -> None:
        try:
            for check in self._checks:
                self._passed.append(compare(check))
        except Exception as error:  # whatever it is, the main thread ends the run with it
            self._fault = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
