"""The one exception that commands turn into a one-line message."""


class MiMError(RuntimeError):
    """Bad input or bad environment. The message is one line: it names the file or option, and the remedy."""
