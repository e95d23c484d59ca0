"""Why a question to the side door has no answer."""

from collections.abc import Callable

HasLeft = Callable[[], bool]
"""Whether the client has closed its socket. Work that takes long asks now and then, and ends with Gone."""


class Refused(Exception):
    """The request is at fault; the text says how."""


class Failed(Exception):
    """The request is not at fault; the text says what happened."""


class Unavailable(Exception):
    """This engine cannot do that at all; the text says why."""


class Gone(Exception):
    """The client has closed its socket."""
