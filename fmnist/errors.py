"""What ends a command with one line on stderr, and no traceback."""


class UserError(Exception):
    """What the user can mend: a message that says what is wrong and what to do. Exit code 2."""


class CannotWrite(UserError):
    """A file could not be written: the disk is full, or it is not ours. What was there before is still there."""


class Lost(UserError):
    """Another rank of the run has ended. `speaker` is the rank that prints it, for all."""

    def __init__(self, message: str, speaker: int) -> None:
        super().__init__(message)
        self.speaker = speaker


class Interrupted(Exception):
    """Ctrl-C during a run that can go on: a message that says how. Exit code 130, the shells' for SIGINT."""
