"""The errors that are one line to the user: what is wrong, where, and how to fix it."""


class UserError(Exception):
    """Bad input. The command line prints it as one line on standard error and exits with code 2."""


class LocalError(UserError):
    """The fault of one process or its machine, which rank 0 may not see: printed whatever the rank."""


class RunStopped(Exception):
    """A run that cannot go on, such as one whose loss is NaN or Inf: one line, and an exit code.

    Args:
        message: the line.
        code: the exit code.
        said: the line is on the screen already.
    """

    def __init__(self, message: str, *, code: int = 1, said: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.said = said
