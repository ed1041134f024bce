"""The exceptions a user is meant to see: a message, a hint with the next command to type, and an exit code."""

LONGEST = 1000  # characters of a message; what a file holds may be quoted in it


class ShlError(Exception):
    """A problem the user can mend. The command line prints it without a traceback."""

    def __init__(self, message: str, *, hint: str = "", code: int = 1) -> None:
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} … {message[-LONGEST // 4 :]}"
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code


class InputError(ShlError):
    """Something in an input file is wrong; `where` says which file, line and field."""

    def __init__(self, message: str, *, where: str = "", hint: str | None = None) -> None:
        usual = "mend it there, or make the file again" if where else ""
        super().__init__(f"{where}: {message}" if where else message, hint=usual if hint is None else hint)
        self.where = where


class Mismatch(ShlError):
    """An artifact was made for another model, chain or template than the one at hand."""


class BelowGate(ShlError):
    """The command finished, and its result is below a gate that the user set."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint, code=3)
