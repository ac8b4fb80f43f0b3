"""The errors mwtool raises, with messages for the person at the terminal.

Each message is one line: what was found, what was expected, what to do next. The
command line prints it and exits with 1; a library caller catches `MwtoolError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


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


def line_of(fault: BaseException, *, whole: bool = False) -> str:
    """What a library's exception says, on one line: its first useful sentence, or with `whole` all of it."""
    if whole:
        return " ".join(str(fault).split()) or type(fault).__name__
    first, _, rest = str(fault).strip().partition("\n")
    first = first.removesuffix(".")
    if first.endswith(":"):  # the reason comes below
        first = f"{first} {rest.strip().partition(chr(10))[0].strip()}"
    if isinstance(fault, KeyError | AttributeError | ArithmeticError):  # little more than a name
        return f"{type(fault).__name__} {first}".strip()
    return first or type(fault).__name__


def nearest(
    name: str,
    known: Sequence[str],
    otherwise: str | None = None,
    *,
    shown: Callable[[str], str] = str,
    most: int = 1,
    cutoff: float = 0.5,
) -> str:
    """Advice on an unknown name: "did you mean ...?" with the most similar known ones.

    otherwise: what to say where none is similar; None: all known names. shown: a name as it is
    written in the question. most: how many names are offered. cutoff: how similar they must be, between 0 and 1.
    """
    import difflib

    near = difflib.get_close_matches(name, known, n=most, cutoff=cutoff)
    if near:
        return f"did you mean {' or '.join(map(shown, near))}?"
    return f"known are {', '.join(known)}" if otherwise is None else otherwise
