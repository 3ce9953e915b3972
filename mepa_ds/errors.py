"""The one exception that entry points turn into a message instead of a traceback."""


class UserError(ValueError):
    """Something the user gave is wrong: says what was given, what is allowed and how to mend it.

    Entry points print the message alone and exit with status 2; every other exception is a bug of ours and
    keeps its traceback.
    """
