"""The HTML page: its structure, what it escapes, and what it refuses."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny
from command import run
from evaluations import compared, evaluated
from sweeps import swept
from words import planted

import mwtool
from mwtool.ablation.sweep import Sweep
from mwtool.errors import BadValue
from mwtool.files.tabular import shown
from mwtool.models.source import DEMO
from mwtool.report.page import models, page_of, read_for_page
from mwtool.report.sections import SECTIONS

EVIL = "owner/<script>alert(1)</script></svg>$x_{2$"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Structure(HTMLParser):
    """Elements with their attributes; fails where they are not nested."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.found if name == tag]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    loaded = planted(tmp_path_factory.mktemp("planted"))
    model = tiny.model("llama")
    tiny.plant(model)
    found = [swept(loaded, Sweep(ks=(1, 2), draws=2)).to_dict(), mwtool.scan_model(model).to_dict()]
    return [{**one, "model": "owner/name", "command": "mwtool <b>"} for one in found]


def test_the_page_is_nested_and_has_each_figure_and_table_with_its_name(documents: list[dict[str, Any]]) -> None:
    structure = Structure(page_of(documents))
    figures = [attrs for attrs in structure.all("div") if attrs.get("role") == "img"]
    assert len(figures) == len(structure.all("svg")) == 2
    assert all(attrs["aria-label"] for attrs in figures)
    assert len(structure.all("caption")) == len(structure.all("table")) == 3
    assert all(len(text) > 20 for text in re.findall(r"<figcaption>(.*?)</figcaption>", page_of(documents)))
    assert {attrs["scope"] for attrs in structure.all("th")} == {"col"}
    assert structure.all("html") == [{"lang": "en"}]
    assert [len(structure.all(name)) for name in ("h1", "main", "nav")] == [1, 1, 1]


def test_ids_are_unique_and_links_lead_to_them(documents: list[dict[str, Any]]) -> None:
    page = page_of(documents)
    structure = Structure(page)
    ids = [attrs["id"] for _, attrs in structure.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [str(attrs["href"]) for attrs in structure.all("a")] + re.findall(r'xlink:href="([^"]*)"', page)
    links += re.findall(r"url\((#[^)]*)\)", page)
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_the_scan_comes_first_whatever_the_order_of_the_files(documents: list[dict[str, Any]]) -> None:
    assert re.findall(r"<h2[^>]*>(\w+)", page_of(documents)) == ["Scan", "Ablation"]
    assert page_of(documents) == page_of(documents[::-1])


def test_what_comes_from_a_document_is_escaped(documents: list[dict[str, Any]]) -> None:
    evil = [{**one, "model": EVIL, "command": EVIL, "notes": [EVIL], "dtype": EVIL} for one in documents]
    page = page_of(evil)
    structure = Structure(page)
    assert structure.all("script") == []
    assert len(structure.all("svg")) == 2
    assert "owner/&lt;script&gt;" in page


def test_the_page_asks_the_network_for_nothing(documents: list[dict[str, Any]]) -> None:
    page = page_of(documents)
    assert "default-src 'none'" in page
    loaded = re.findall(r'(?:src|href)="(?!#|data:)([^"]*)"', page)
    assert loaded == []
    assert "@import" not in page
    assert len(page.encode()) < 2_000_000


def test_the_command_reads_folders_and_leaves_other_json_alone(documents: list[dict[str, Any]], tmp_path: Path) -> None:
    for at, one in enumerate(documents):
        (tmp_path / f"{at}.json").write_text(json.dumps(one))
    (tmp_path / "config.json").write_text("{}")
    ran = run("report", tmp_path, "-o", tmp_path / "page.html")
    assert (ran.code, ran.out) == (0, "")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page_of(documents)


def test_every_document_of_the_page_is_held_against_its_model(documents: list[dict[str, Any]], tmp_path: Path) -> None:
    for schema, model in models().items():
        assert schema in str(model.model_fields["schema_"].annotation)
    assert list(models()) == list(SECTIONS)
    path = tmp_path / "ablation.json"
    path.write_text(json.dumps({**documents[0], "runs": [{}]}))
    for given in (path, tmp_path):
        assert (
            f"{path} is no complete mwtool.ablate/1 document (runs.0.mode: field required)"
            in run("report", given).fault
        )


def test_documents_of_two_models_and_other_files_are_refused(documents: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(BadValue, match=r"documents of 2 models were given \((owner/name, other|other, owner/name)\)"):
        page_of([documents[0], {**documents[1], "model": "other"}])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadValue, match="has schema None; expected one of"):
        read_for_page([tmp_path / "config.json"])
    with pytest.raises(BadValue, match="there is no document in"):
        read_for_page([tmp_path])


@pytest.fixture(scope="module")
def evaluation() -> dict[str, Any]:
    bits = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    return evaluated("owner/name", none=bits, zero=[0.0] * 6)


def test_one_folder_by_several_names_is_one_model(
    documents: list[dict[str, Any]], evaluation: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a study: an adapter's documents name its base model as the adapter does, by the absolute path."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    for one, other in (("model", str(tmp_path / "model")), ("demo", str(DEMO)), ("./model/", "model")):
        page = page_of([{**documents[0], "model": one}, {**evaluation, "model": other}])
        assert f"<h1>{one.rstrip('/').removeprefix('./')}: massive weights</h1>" in page
    with pytest.raises(BadValue, match=r"documents of 2 models were given \(model, other\)"):
        page_of([{**documents[0], "model": one} for one in ("model", str(tmp_path / "model"), "other")])


def test_a_comparison_is_on_the_page_of_each_of_its_models(
    documents: list[dict[str, Any]], evaluation: dict[str, Any]
) -> None:
    both = compared(evaluated("other", none=[1.0] * 6), evaluation)
    page = page_of([*documents, evaluation, both])
    assert re.findall(r"<h2[^>]*>([^<]+)", page) == ["Scan", "Ablation", "Evaluation", "Comparison"]
    assert "<h1>owner/name: massive weights</h1>" in page
    assert "<h1>other and owner/name: massive weights</h1>" in page_of([both])
    with pytest.raises(BadValue, match="documents of 3 models"):
        page_of([{**documents[0], "model": "third"}, both])


def test_spellings_of_one_folder_are_one_model_and_two_sections_of_a_kind_are_told_apart(
    documents: list[dict[str, Any]], evaluation: dict[str, Any]
) -> None:
    page = page_of([{**evaluation, "model": name} for name in ("./model", "model/")])
    assert re.findall(r"<h2[^>]*>([^<]+)", page) == ["Evaluation", "Evaluation (2)"]


def test_the_hatches_of_many_series_do_not_swell_the_page() -> None:
    names = "abcdef"
    page = page_of([compared(*(evaluated(name, none=[1.0, 0.0, 1.0, 0.0]) for name in names))])
    assert page.count("<pattern") >= len(names) - 1
    assert len(page.encode()) < 150_000


def test_what_changes_is_said_with_its_interval(evaluation: dict[str, Any]) -> None:
    page = page_of([evaluation])
    assert "mc:x acc under zero:1, beside no attack: -66.7 points [-120.9 to -12.5]." in page
    same = page_of([evaluated("owner/name", none=[1.0, 0.0, 1.0, 0.0], zero=[1.0, 0.0, 1.0, 0.0])])
    assert "0.0 points [0.0 to 0.0], which cannot be told from no change." in same


def test_random_draws_are_one_line_of_the_table(documents: list[dict[str, Any]]) -> None:
    ablation = next(one for one in documents if one["schema"] == "mwtool.ablate/1")
    page = page_of([ablation])
    draws = [run["ratio"] for run in ablation["runs"] if (run["control"] or "").startswith("random") and run["k"] == 1]
    values = [value for run in draws for value in run.values()]
    assert len(values) == 4
    assert page.count("random, 2 draws") == 4  # zero and retain, 1 and 2 rows
    assert f"<td>{shown(min(values[:2]))} to {shown(max(values[:2]))}</td>" in page


def test_the_answers_of_each_variant_are_on_the_page() -> None:
    document = evaluated("owner/name", none=[0.0], zero=[0.0])
    for result, answer in zip(document["results"], ("Paris", "<b>"), strict=True):
        result |= {"task": "generate:x", "answers": [answer], "setting": {"prompts": ["The capital is"]}}
    page = page_of([document])
    assert "<td>Paris</td>" in page
    assert "<td>&lt;b&gt;</td>" in page
    assert "<svg" not in page
