"""What can go wrong, in words for the person at the terminal.

Each message is one line: what was found, what was expected, what to do next. The
command line prints it and exits with 1; a library caller catches `MwtoolError`.
"""

from __future__ import annotations

from collections.abc import Sequence


class MwtoolError(Exception):
    """Any failure mwtool foresees."""


class ModelNotFound(MwtoolError):
    """MODEL names nothing that can be opened: no folder, no Hub repository, no access."""


class UnsupportedModel(MwtoolError):
    """The model opens but its type, architecture or quantization is not one mwtool can read."""


class BadCheckpoint(MwtoolError):
    """The weights are damaged: files cut short or absent, tensors absent, misshapen or non-finite."""


class NoBos(MwtoolError):
    """No beginning-of-sequence token can be determined, or the one given is not in the vocabulary."""


class BadPlugin(MwtoolError):
    """An adapter plugin cannot be loaded, or contradicts another one."""


class BadValue(MwtoolError):
    """An option or a field of a file has a value the model at hand does not allow."""


class OutputError(MwtoolError):
    """The result cannot be written where it was asked for."""


class BadSyntax(BadValue):
    """A text cannot be parsed, and the character at which that shows is known.

    text: what was read; position: index of the character, from 0, `len(text)` for its end.
    """

    def __init__(self, message: str, text: str, position: int) -> None:
        super().__init__(message)
        self.text, self.position = text, position

    @property
    def pointer(self) -> str:
        """The text, and below it a caret under the character."""
        return f"{self.text}\n{' ' * self.position}^"


def line_of(fault: BaseException) -> str:
    """A library's exception in its first sentence of use, for messages that fit on one line."""
    first, _, rest = str(fault).strip().partition("\n")
    first = first.removesuffix(".")
    if first.endswith(":"):  # the reason comes below
        first = f"{first} {rest.strip().partition(chr(10))[0].strip()}"
    if isinstance(fault, KeyError | AttributeError | ArithmeticError):  # little more than a name
        return f"{type(fault).__name__} {first}".strip()
    return first or type(fault).__name__


def nearest(name: str, known: Sequence[str]) -> str:
    """Advice on an unknown name: the nearest known one, else all of them."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
