"""The one error that is shown to a user as a line instead of a traceback."""


class FedgroveError(Exception):
    """A fault that the user can mend.

    The message is one line, names the key, file or client, and says the remedy. The command line prints it on
    standard error and ends with status 2. Everything else that is raised is a defect of fedgrove.
    """
