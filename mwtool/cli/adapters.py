"""`mwtool adapters`."""

from __future__ import annotations

import json as _json
import sys
from dataclasses import asdict

from mwtool.cli import options


def adapters(json: options.Json = False, debug: options.Debug = False) -> None:
    """List the model types that can be scanned, and which distribution serves each."""
    from mwtool.registry import installed

    plugins = installed()
    if json:
        sys.stdout.write(_json.dumps([asdict(plugin) for plugin in plugins], indent=2) + "\n")
        return
    from rich.console import Console

    from mwtool.report import adapters_table

    Console().print(adapters_table(plugins))
