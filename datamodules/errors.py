"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in what the user gave: a file, a field, an option.

    The message is complete in itself: it names the file and the field, what was expected, what was found
    and what to do. The command line prints it without a traceback (``--debug`` shows one) and exits with 2.
    """
