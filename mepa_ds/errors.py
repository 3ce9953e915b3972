"""The one exception that entry points turn into a message instead of a traceback."""

from mepa_ds.safety.text import message as as_message


class UserError(ValueError):
    """Something the user gave is wrong: says what was given, what is allowed and how to mend it.

    Entry points print the message alone and exit with status 2; every other exception is a bug of ours and
    keeps its traceback. `agreed`: every rank raises this same error, so one of them speaks for all.

    The message is made fit to be shown, logged and stored (mepa_ds.safety.text.message): names in it may come from
    strangers' files, and addresses may hold passwords.
    """

    def __init__(self, message: str = "", agreed: bool = False):
        super().__init__(as_message(message))
        self.agreed = agreed


class DivergedError(UserError):
    """A run's loss has grown out of hand at `step`, so that to go on would be a waste. Raised on every rank."""

    def __init__(self, message: str, step: int):
        super().__init__(message, agreed=True)
        self.step = step


class DamagedError(UserError):
    """A sample, shard or image that cannot be read as what it should be; the message names the file and the key."""
