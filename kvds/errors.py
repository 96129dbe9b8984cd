"""The one exception that means "what you gave cannot work, and here is what would"."""


class InputError(ValueError):
    """A fault in a flag, file, model or data row that the user can mend.

    The text is one line that names the place, the value, what was expected and the remedy. Entry points print it
    without
    a traceback and exit with code 2.
    """
