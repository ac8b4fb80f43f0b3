"""What each installed model type does without for one position, and whether its scan stays the same, bit for bit.

    python tests/benchmarks/one_position.py

Scans a tiny random model of every type twice, in bfloat16 and in float32: as it is done, and with everything read.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import tiny
import torch

from mwtool.models.streaming import Stream
from mwtool.scan.scanner import Scan, scan_checkpoint


def alike(one: Scan, other: Scan) -> bool:
    """Whether two scans have the same document and the same states."""
    pairs = zip(one.states, other.states, strict=True)
    names = ("hidden", "intermediate", "added")
    same = all(torch.equal(getattr(ours, name), getattr(theirs, name)) for ours, theirs in pairs for name in names)
    return same and {**one.to_dict(), "unread": None} == {**other.to_dict(), "unread": None}


def main() -> None:
    """Print a line a type and precision."""
    different = []
    for dtype in (torch.bfloat16, torch.float32):
        for model_type in tiny.ALL_TYPES:
            with tempfile.TemporaryDirectory() as folder:
                name = str(tiny.saved(Path(folder), tiny.model(model_type, dtype)))
                found = scan_checkpoint(name)
                with patch.object(Stream, "leave_out", lambda _stream: None):
                    same = alike(found, scan_checkpoint(name))
            left_out = ", ".join(f"{one.parameter} of {len(one.layers)} layers" for one in found.unread)
            print(f"{model_type} {dtype}: {'equal' if same else 'DIFFERENT'}; without {left_out or 'nothing'}")
            different += [] if same else [model_type]
    print(f"{2 * len(tiny.ALL_TYPES)} scans, {len(different)} different")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
