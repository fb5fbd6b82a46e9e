"""The one exception for what a user can mend: the command prints its message, and no traceback, and exits with 2."""


class UserError(Exception):
    """A message that says what is wrong and what to do."""
