"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input, told in one sentence that names the culprit and the way out.

    The command line prints the sentence and exits with code 2; from Python it is an
    ordinary exception.
    """


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known word closest to ``word``, or ``""``."""
    from difflib import get_close_matches

    match = get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean '{match[0]}'?)" if match else ""
