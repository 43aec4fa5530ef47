"""The one error a user of the course should ever see: a sentence that says what is wrong and what to do."""


class LabsError(RuntimeError):
    """Bad input or a missing piece, told in one sentence with the way out. The CLI prints it without a traceback."""
