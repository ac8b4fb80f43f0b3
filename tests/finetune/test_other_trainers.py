"""MacDrop in axolotl and ms-swift: their hooks are called as they call them, with a stand-in for what they import.

docs/in-your-trainer.md says with which versions the trainers themselves were run.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
from command import run
from pydantic import ValidationError
from transformers import Trainer, TrainingArguments
from words import planted_folder

import mwtool
from mwtool.errors import BadSyntax, BadValue
from mwtool.finetune.other_trainers import MacDropOptions, macdrop_callback


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_folder(tmp_path_factory.mktemp("model") / "base", num_hidden_layers=4)


def module(name: str, **names: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(names)
    return made


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin's module, beside a package axolotl whose BasePlugin has nothing of its own."""
    parts = {"axolotl": {}, "axolotl.integrations": {}, "axolotl.integrations.base": {"BasePlugin": object}}
    for name, names in parts.items():
        monkeypatch.setitem(sys.modules, name, module(name, **names))
    monkeypatch.delitem(sys.modules, "mwtool.finetune.axolotl", raising=False)
    return importlib.import_module("mwtool.finetune.axolotl")


@pytest.fixture
def swift(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """ms-swift's table of callbacks."""
    table: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "swift", module("swift"))
    monkeypatch.setitem(sys.modules, "swift.callbacks", module("swift.callbacks", callbacks_map=table))
    monkeypatch.delitem(sys.modules, "mwtool.finetune.ms_swift", raising=False)
    return table


def test_options_change_what_the_schedule_leaves_open(folder: Path) -> None:
    options = MacDropOptions(schedule="exp:0.5,alpha=0.1", k=2, scope="others", resample="microbatch", seed=7)
    found = macdrop_callback(str(folder), options)
    assert str(found.curriculum).startswith("exp:0.5")
    assert (found.curriculum.k, found.curriculum.scope) == (2, "others")
    assert (found.curriculum.resample, found.curriculum.seed) == ("microbatch", 7)
    assert found.massive == mwtool.scan_checkpoint(str(folder), mwtool.Settings(k=2)).massive


def test_the_rows_of_a_saved_scan_are_taken_as_they_are(folder: Path, tmp_path: Path) -> None:
    assert run("scan", folder, "-o", tmp_path / "scan.json").code == 0
    found = macdrop_callback("no/such-model", MacDropOptions(massive=tmp_path / "scan.json"))
    assert found.massive == mwtool.scan_checkpoint(str(folder)).massive


def test_a_model_without_massive_weights_is_refused(tmp_path: Path) -> None:
    nothing = tiny.saved(tmp_path / "nothing", tiny.quiet(tiny.model("llama", num_hidden_layers=4)))
    with pytest.raises(BadValue, match="no massive weights"):
        macdrop_callback(str(nothing), MacDropOptions())


def test_what_no_option_is_called_is_refused(folder: Path) -> None:
    with pytest.raises(ValidationError, match="probability"):
        MacDropOptions(probability=0.8)  # type: ignore[call-arg] # the mistake
    with pytest.raises(BadSyntax):
        macdrop_callback(str(folder), MacDropOptions(schedule="step:"))


@pytest.mark.parametrize("given", ["step:0.5", {"schedule": "step:0.5", "k": 3}], ids=["schedule", "settings"])
def test_axolotls_yaml_gives_one_callback(axolotl: Any, folder: Path, given: Any) -> None:
    plugin = axolotl.MacDropPlugin()
    home, _, name = plugin.get_input_args().rpartition(".")
    arguments = getattr(importlib.import_module(home), name)
    validated = arguments.model_validate({"macdrop": given}).model_dump(exclude_none=True)
    (callback,) = plugin.add_callbacks_post_trainer({"base_model": str(folder), **validated}, trainer=None)
    assert isinstance(callback, mwtool.MacDropCallback)
    assert str(callback.curriculum).startswith("step:0.5")
    assert callback.curriculum.k == (5 if isinstance(given, str) else 3)


def test_axolotl_without_the_key_trains_without_macdrop(axolotl: Any, folder: Path) -> None:
    assert axolotl.MacDropPlugin().add_callbacks_post_trainer({"base_model": str(folder)}, trainer=None) == []


def test_ms_swift_finds_the_callback_by_its_name(swift: dict[str, Any], folder: Path) -> None:
    importlib.import_module("mwtool.finetune.ms_swift").register("step:0.5", k=2)
    trainer = SimpleNamespace(model_info=SimpleNamespace(model_dir=str(folder)))
    callback = swift["macdrop"](None, trainer)
    assert isinstance(callback, mwtool.MacDropCallback)
    assert callback.massive == mwtool.scan_checkpoint(str(folder), mwtool.Settings(k=2)).massive


def test_a_callback_among_the_defaults_reaches_a_trainer_that_a_script_builds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the documentation does for TRL's scripts, whose trainers take no callbacks."""
    from transformers import trainer

    callback = macdrop_callback(str(folder), MacDropOptions())
    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, callback])
    made = Trainer(tiny.opened(folder), TrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True))
    assert callback in made.callback_handler.callbacks
