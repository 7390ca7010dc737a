"""Locks between processes on open files and folders; a lock ends with the process that holds it."""

import errno
import fcntl

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def lock(descriptor: int, wait: bool = False) -> bool:
    """Keep other processes out of an open file or folder.

    Returns:
        Whether it is locked: some network file systems have no locks, and nothing keeps others out there.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is false.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True
