"""Perplexity of compiled layers: the figures of the uncompiled model under every attack, its price, what is refused.

The backends here trace as inductor does and generate no code, which takes half a minute; tests/test_gpu.py has that.
"""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import run
from peft import LoraConfig, get_peft_model
from test_batches import cut, with_room_for
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from words import planted, planted_folder, text_of

from mwtool.ablation.sweep import Sweep, ablate
from mwtool.errors import MwtoolError, UnsupportedModel
from mwtool.evaluation import evaluate as evaluation
from mwtool.evaluation.compiled import Compilation, Speed
from mwtool.evaluation.config import Options
from mwtool.evaluation.evaluate import evaluate
from mwtool.evaluation.perplexity import perplexity
from mwtool.evaluation.tasks import parse_tasks
from mwtool.models.load import Loaded
from mwtool.scan.loaded import massive_for
from mwtool.scan.settings import Choice, Settings
from mwtool.scan.targets import find_targets
from mwtool.surgery.attack import parse_attack, parse_mode

# torch warns of its own tracing
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)
TRACED = "aot_eager"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "Compilation", partial(Compilation, backend=TRACED))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return planted(tmp_path_factory.mktemp("model"))


def compilation(model: Any, backend: Any = TRACED) -> Compilation:
    return Compilation(model, [model.get_submodule(one.path) for one in tiny.layers_of(model)], backend=backend)


@pytest.mark.usefixtures("traced")
def test_every_attack_of_eval_has_the_perplexity_of_the_uncompiled_model(loaded: Loaded) -> None:
    massive, _ = massive_for(loaded, None, Settings(k=4))
    attacks = [parse_attack(text) for text in ("none", "zero:2", "retain:2", "scale:0.5:2")]
    plain, compiled = (
        evaluate(loaded, massive, attacks, parse_tasks([text_of(loaded)]), Options(window=16, compile=one))
        for one in (False, True)
    )
    assert counters["stats"]["unique_graphs"] == 2  # a layer and the loss
    values = [one.measured.value for one in plain]
    assert len(set(values)) == len(attacks)
    assert [one.measured.value for one in compiled] == pytest.approx(values, rel=1e-5)


@pytest.mark.usefixtures("traced")
def test_every_mode_of_ablate_has_the_perplexity_of_the_uncompiled_model(loaded: Loaded) -> None:
    """`mean` acts by a hook, which compiled code would not see; layers below an attack are replayed."""
    sweep = Sweep(tuple(map(parse_mode, ("zero", "retain", "mean", "scale:0.5"))), (2,), 1, 0)
    groups, _ = find_targets(loaded, Choice(each_layer=True), 2, Settings())
    plain, compiled = (
        ablate(loaded, groups, parse_tasks([text_of(loaded)]), sweep, Options(window=16, compile=one))
        for one in (False, True)
    )
    assert counters["stats"]["unique_graphs"] == 2
    values = [one.measured[0].value for one in plain.runs]
    assert len(set(values)) > len(values) / 2
    assert [one.measured[0].value for one in compiled.runs] == pytest.approx(values, rel=1e-5)
    assert [note for note in compiled.notes if "compiled in" in note] == [
        note for note in compiled.notes if note not in plain.notes
    ]


def test_with_a_peft_adapter_it_is_that_of_the_uncompiled_model() -> None:
    base: Any = tiny.model("llama", num_hidden_layers=2)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["up_proj", "q_proj"], init_lora_weights=False)).eval()
    assert perplexity(model, cut(), batch_size=3).value != pytest.approx(
        perplexity(tiny.model("llama", num_hidden_layers=2), cut(), batch_size=3).value, rel=1e-4
    )
    found = perplexity(model, cut(), batch_size=3, compiled=compilation(base))
    assert found.value == pytest.approx(perplexity(model, cut(), batch_size=3).value, rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2"])
def test_in_float64_the_losses_are_those_of_the_uncompiled_model(model_type: str) -> None:
    model = tiny.model(model_type, torch.float64, num_hidden_layers=2)
    plain, compiled = (perplexity(model, cut(), batch_size=3, compiled=one) for one in (None, compilation(model)))
    assert compiled.nll == pytest.approx(plain.nll, rel=1e-9)


def test_batches_of_another_shape_run_uncompiled_and_nothing_is_compiled_twice() -> None:
    """Seven windows in threes: two whole batches, and a shorter window by itself."""
    model = tiny.model("llama", num_hidden_layers=4)
    before = [dict(layer.__dict__) for layer in model.model.layers]
    compiled = compilation(model)
    for _ in range(2):
        perplexity(model, cut(), batch_size=3, compiled=compiled)
    assert counters["stats"]["unique_graphs"] == 2
    assert compiled.speed is not None
    assert compiled.speed.windows == 3
    assert [layer.__dict__.keys() for layer in model.model.layers] == [one.keys() for one in before]


def test_where_memory_ends_the_smaller_batch_is_compiled() -> None:
    model = tiny.model("llama", num_hidden_layers=2)
    whole = perplexity(model, cut(), batch_size=1)
    with_room_for(48, model)
    compiled = compilation(model)
    assert perplexity(model, cut(), batch_size=7, compiled=compiled).nll == pytest.approx(whole.nll, rel=1e-5)
    assert compiled.speed is not None
    assert compiled.speed.windows == 2


def test_the_model_is_freed_once_it_is_measured_without_waiting_for_the_collector() -> None:
    """The next model of a comparison may not fit beside it."""
    model: Any = tiny.model("llama", num_hidden_layers=2)
    compiled = compilation(model)
    gc.collect()
    gc.disable()
    try:
        perplexity(model, cut(), batch_size=3, compiled=compiled)
        weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
        del model, compiled
        assert weight() is None
    finally:
        gc.enable()


def test_compiling_pays_once_what_windows_save_is_what_it_took() -> None:
    speed = Speed(windows=4, seconds=12.0, before=0.050, after=0.031)
    assert speed.pays == 632
    assert replace(speed, after=0.05).pays is None


def _wrong(graph: Any, _inputs: Any) -> Callable[..., Any]:
    return lambda *args: tuple(one * 1.5 for one in graph(*args))


def _broken(_graph: Any, _inputs: Any) -> Callable[..., Any]:
    raise OSError("no compiler was found\nand more")


def test_a_compiler_that_computes_something_else_is_refused() -> None:
    model = tiny.model("llama", num_hidden_layers=2)
    with pytest.raises(MwtoolError, match=r"^the compiled model gives \d+\.\d+ nats a token .*: leave out --compile$"):
        perplexity(model, cut(), batch_size=3, compiled=compilation(model, _wrong))


def test_a_compiler_that_fails_is_one_line_and_the_model_is_as_before() -> None:
    model = tiny.model("llama", num_hidden_layers=2)
    with pytest.raises(
        MwtoolError, match=r"^torch.compile failed \(.*no compiler was found\): .* leave out --compile$"
    ):
        perplexity(model, cut(), batch_size=3, compiled=compilation(model, _broken))
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


def test_without_a_cxx_compiler_the_command_ends_in_one_line(tmp_path: Path) -> None:
    folder = planted_folder(tmp_path, num_hidden_layers=8)
    with inductor.patch("cpp.cxx", ("no-such-compiler",)):
        ran = run("eval", folder, "--task", f"ppl:{folder / 'text.txt'}", "--window", 16, "--compile")
    assert ran.code == 1
    assert ran.out == ""
    assert ran.err.count("\n") <= 2
    assert "torch.compile failed (" in ran.err
    assert "or leave out --compile" in ran.err


def test_quantized_and_offloaded_models_are_refused() -> None:
    model: Any = tiny.model("llama", num_hidden_layers=2)
    model.hf_quantizer = object()
    with pytest.raises(UnsupportedModel, match=r"^the model is quantized, and is not compiled: leave out --compile$"):
        compilation(model)
    del model.hf_quantizer
    model.model.layers[1]._hf_hook = object()
    with pytest.raises(UnsupportedModel, match="several devices or in files"):
        compilation(model)


@pytest.mark.usefixtures("traced")
def test_documents_and_notes_say_what_compiling_took_and_a_resumed_run_does_not_mix(
    tmp_path: Path,
) -> None:
    folder, output = planted_folder(tmp_path), tmp_path / "eval.json"
    command = ["eval", folder, "--task", f"ppl:{folder / 'text.txt'}", "--window", 16, "--batch-size", 2, "-o", output]
    ran = run(*command, "--compile", "--attack", "none", "--attack", "zero:2", "--json")
    assert ran.code == 0
    assert ran.err.count("compiled in ") == 1
    document = json.loads(ran.out)
    assert document["options"]["compile"] is True
    (note,) = [one for one in document["notes"] if "compiled in " in one]
    for one in document["results"]:
        speed = one["setting"]["compile"]
        assert speed["batch_windows"] == 2
        assert min(speed["window_seconds"], speed["window_seconds_uncompiled"]) > 0
        pays = speed["pays_after_windows"]
        assert (f"paid for itself after {pays:,} windows" if pays is not None else "does not pay for itself") in note
    again = run(*command, "--attack", "retain:2", "--resume")
    assert again.code == 1
    assert "was made with options compile True, now it is compile None" in again.err
    assert run("eval", folder, "--compile", "--dry-run").code == 2


@pytest.mark.parametrize("command", ["eval", "ablate"])
def test_without_a_perplexity_the_option_is_refused(command: str) -> None:
    ran = run(command, "demo", "--task", "mc:demo", "--compile")
    assert ran.code == 1
    assert "--compile is for perplexities and no task is one" in ran.err
