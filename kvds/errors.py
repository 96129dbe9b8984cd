"""The exceptions that mean "here is what went wrong, in one line": the user's input, or what befell a run."""


class InputError(ValueError):
    """A fault in a flag, file, model or data row that the user can mend.

    The text is one line that names the place, the value, what was expected and the remedy. Entry points print it
    without
    a traceback and exit with code 2.
    """


class RunError(RuntimeError):
    """A run that cannot go on though its input was right: a full disk, numbers that are not finite, a lost rank.

    The text is one line that says what happened, what is still whole and what to do. Entry points print it without a
    traceback and exit with code 1.
    """
