"""What can go wrong, by what a caller does about it.

Each is also the built-in error that it is a kind of, so that `except ValueError` goes on catching what it caught.
Wrong arguments are plain `ValueError` and `TypeError`.
"""


class SteeringError(Exception):
    """Base of the errors of this library."""


class UnsupportedError(SteeringError, ValueError):
    """This model, cache or call cannot be steered exactly. Raised before the first token."""


class MismatchError(SteeringError, ValueError):
    """What was trained does not fit: another width, another backbone, a calibration of another head."""


class ArtefactError(SteeringError, ValueError):
    """The files of something trained are incomplete, corrupt, or of something else."""


class ScoringError(SteeringError, RuntimeError):
    """A text could not be checked, or steered, to its end. Do not show what was made of it."""


class UploadError(SteeringError, RuntimeError):
    """An upload did not complete."""


class FieldError(ValueError):
    """One field of what a person wrote is wrong.

    Args:
        field (`str`): its name, by which a recipe finds its line.
        message (`str`): one sentence, which may begin with the name in backticks.
    """

    def __init__(self, field: str, message: str):
        super().__init__(field, message)
        self.field = field

    def __str__(self) -> str:
        return str(self.args[1])
