"""The one error that is the user's: a line that says what is wrong, where, and how to mend it."""


class UserError(Exception):
    """Bad input. The command line prints it as one line on standard error and exits with code 2."""


class RunStopped(Exception):
    """A run that cannot go on, such as one whose loss is no number any more: one line, and exit code 1."""
