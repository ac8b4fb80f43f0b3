"""What is told of a scan before it is run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from command import run

from mwtool.scan.forecast import ScanForecast, SeriesForecast, rest_of
from mwtool.scan.plan import Part, plan_scan

MEASURED = """
import atexit, sys
from mwtool.models.peak_memory import process_peak
atexit.register(lambda: sys.stderr.write(f"\\npeak {process_peak()}"))
sys.argv = ["mwtool", "scan", "demo", "--json"]
from mwtool.cli import main
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak of a process begins with its parent's")
def test_the_memory_of_the_process_is_told_within_15_percent_of_what_it_then_takes() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "mwtool", "scan", "demo", "--dry-run", "--json"], capture_output=True, check=True
    )
    ran = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    measured = int(ran.stderr.rpartition("peak ")[2])
    assert json.loads(told.stdout)["memory"]["process"] == pytest.approx(measured, rel=0.15)


def test_the_layers_left_out_take_as_long_as_their_bytes_do() -> None:
    plan = replace(plan_scan("demo"), parts=(Part("before", 1, 5), *(Part(f"layer {n}", 1, 10 + n) for n in range(6))))
    assert rest_of(plan, [7.0, 7.5, 8.2]) == pytest.approx(1.2 / (11 + 12) * (13 + 14 + 15))  # not the first layer
    assert rest_of(plan, [7.0 + n for n in range(6)]) == 0
    assert rest_of(plan, [7.0]) == 0


def test_a_dry_run_tells_no_time_unless_it_tries() -> None:
    plan = run("scan", "demo", "--dry-run", "--json").document
    tried = run("scan", "demo", "--dry-run", "--trial", "--json").document
    assert (plan["schema"], plan["total_seconds"]) == ("mwtool.scan.plan/1", None)
    assert tried["total_seconds"] > 0
    same = ("parts", "bytes_read", "layers", "walked", "files", "bytes_of_files")
    assert [plan[name] for name in same] == [tried[name] for name in same]
    assert run("scan", "demo", "--trial").code == 2


def test_scans_that_were_not_tried_go_by_the_bytes_of_the_last_that_was() -> None:
    plan = replace(plan_scan("demo"), parts=(Part("before", 1, 0), Part("layer 0", 1, 100)))
    one = ScanForecast(plan=plan, device="cpu", process=7, gpu=None, trial=5.0, rest=1.0)
    other = replace(one, trial=2.0, rest=2.0)
    left = replace(one, plan=replace(plan, parts=(Part("layer 0", 1, 250),)), process=9, trial=None, rest=None)
    series = SeriesForecast(scans=(one, other, left))
    assert series.seconds(10.0) == 10 + 6 + 4 + 4 * 250 / 100
    assert (series.size, series.process, series.gpu) == (450, 9, None)
    assert SeriesForecast(scans=(left,)).seconds(10.0) is None


def test_compare_and_track_tell_the_scans_they_will_make() -> None:
    single = run("scan", "demo", "--dry-run", "--json").document
    for command in ("compare", "track"):
        found = run(command, "demo", "demo", "--dry-run", "--json").document
        assert [one["bytes_read"] for one in found["scans"]] == [single["bytes_read"]] * 2
        assert (found["schema"], found["total_seconds"]) == ("mwtool.scans.plan/1", None)
        assert run(command, "demo", "demo", "--trial").code == 2
    assert run("compare", "a.json", "b.json", "--dry-run").code == 2
