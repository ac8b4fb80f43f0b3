"""Choices that make training faster and cannot all be had together, nor everywhere."""

from __future__ import annotations

from mwtool.errors import BadValue, UnsupportedModel
from mwtool.finetune.config import Recipe


def refuse_together(recipe: Recipe, processes: int) -> None:
    """Refuse what does not go together, before a model is opened.

    Raises BadValue for options that exclude each other or a package that is missing, UnsupportedModel where it is not
    proven that a compiled model sees the entries that MacDrop drops.
    """
    if recipe.padding_free and recipe.wants_batches:
        other = "--group-by-length" if recipe.group_by_length else "--torch-compile"
        raise BadValue(f"--padding-free and {other} exclude each other: rows have no padding to save; give one of them")
    if recipe.torch_compile and not recipe.curriculum.idle:
        what = "several processes" if processes > 1 else "--quantize" if recipe.quantize else None
        if what is not None:
            raise UnsupportedModel(
                f"whether a compiled model sees the entries that MacDrop drops is not known under {what}: "
                f"leave out --torch-compile"
            )
    if recipe.use_liger_kernel:
        from transformers.utils.import_utils import is_liger_kernel_available

        if not is_liger_kernel_available():
            raise BadValue(
                "--use-liger-kernel needs the package liger_kernel (0.3.0 or newer): pip install liger-kernel, or "
                "leave the option out"
            )


def refuse_on(device: str, recipe: Recipe) -> None:
    """Raise BadValue where Liger's kernels, which are written in Triton, cannot run. device: a torch device's name."""
    if recipe.use_liger_kernel and device.partition(":")[0] not in {"cuda", "xpu"}:
        raise BadValue(f"--use-liger-kernel needs a GPU, and the device is {device}: leave the option out")
