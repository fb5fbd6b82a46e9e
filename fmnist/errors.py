"""What ends a command with one line on stderr, and no traceback."""


class UserError(Exception):
    """What the user can mend: a message that says what is wrong and what to do. Exit code 2."""


class CannotWrite(UserError):
    """A file could not be written: the disk is full, or it is not ours. What was there before is still there."""


class Interrupted(Exception):
    """Ctrl-C during a run that can go on: a message that says how. Exit code 130, the shells' for SIGINT."""
