"""What a launch may end in besides results."""


class Fault(Exception):
    """The kernel did something wrong: an access out of bounds, a race, a barrier that never
    fills.
    """


class Unsupported(Exception):
    """The kernel reached an instruction, or a form of one, that the emulator does not know."""
