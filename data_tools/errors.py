"""The one exception for wrong input, shared by both command lines."""


class UserError(Exception):
    """Wrong input: one sentence that says what is wrong, where, and how to mend it.

    The command lines print it as ``error: <sentence>`` and exit with 2; anywhere else it is an ordinary exception.
    """
