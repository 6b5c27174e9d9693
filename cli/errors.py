"""What the terminal shows when a command cannot do what was asked."""

from shared.errors import BanyanError


class CommandFailed(BanyanError):
    """A command could not do what was asked; the message says why and what to do next."""
