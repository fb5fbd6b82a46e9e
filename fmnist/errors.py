"""What ends a command with one line on stderr, and no traceback."""


class UserError(Exception):
    """What the user can mend: a message that says what is wrong and what to do. Exit code 2."""


class Interrupted(Exception):
    """Ctrl-C during a run that can go on: a message that says how. Exit code 130, the shells' for SIGINT."""
