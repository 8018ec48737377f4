"""The one exception that a user is meant to read."""


class InputError(Exception):
    """Bad input: one sentence that names the file, the field and the remedy.

    Entry points print it to stderr without a traceback and exit with code 2.
    """
