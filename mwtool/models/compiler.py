"""What torch.compile cannot do, said in one line that names the option it was asked for with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import SubprocessError
from typing import Any

from mwtool.errors import MwtoolError, UnsupportedModel, line_of

FAULTS = (
    RuntimeError,
    OSError,
    ImportError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    SubprocessError,
)
"""What tracing, generating code and running a C++ compiler may raise, where the same model runs uncompiled."""


def compiler_failed(option: str, fault: BaseException) -> MwtoolError:
    """What to tell a user of `option` whose compiler failed, because there is none or for a fault of its own."""
    return MwtoolError(f"torch.compile failed ({line_of(fault)}): install what it names, or leave out {option}")


@contextmanager
def explained_for(option: str) -> Iterator[None]:
    """Raises MwtoolError where torch's compiler fails inside the block; all else as it comes."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as fault:
        raise compiler_failed(option, fault) from fault


def refuse_uncompilable(model: Any, option: str) -> None:
    """Raise UnsupportedModel where it is not proven that a compiled model computes what the model does.

    model: a transformers model, without PEFT's wrapper.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        what = "is quantized"
    elif any(one.is_meta for one in model.parameters()) or any(hasattr(one, "_hf_hook") for one in model.modules()):
        what = "lies on several devices or in files, from where accelerate loads it"
    else:
        return
    raise UnsupportedModel(f"the model {what}, and is not compiled: leave out {option}")
