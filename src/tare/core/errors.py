"""The errors that users meet. One line each: what is wrong, where, what is allowed, what to do.

The command line maps them to exit codes: `InputError` 2, `DoesNotFit` 3. Anything else is a fault of ours (1).
"""


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line that names the key or file and the fix.

    What files bring into it cannot break the line or speak to the terminal: unprintable characters stand as escapes.

    >>> print(InputError("a\\nb"))
    a\\nb
    """

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in super().__str__())


class DoesNotFit(InputError):
    """The plan says that the run cannot stay inside the budget; the message names the smallest change that would."""


class CheckpointError(InputError):
    """A checkpoint is missing, damaged or belongs to another run. The message names the file."""


def nearest(word: str, allowed: "list[str] | tuple[str, ...]") -> str:
    """A ` (did you mean 'x'?)` hint for a misspelt word, or an empty string.

    >>> nearest("galor", ["galore", "fira"])
    " (did you mean 'galore'?)"
    """
    import difflib

    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
