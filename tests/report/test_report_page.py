from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from folders import FUSED, artifact, audited, certificate, graph, layer, output, write

from reparam_export.report import write_report
from reparam_export.report.plots import layer_plot, output_plot, scale

HOSTILE = "<script>alert(1)</script>\"'|`@you\u202e\x00\ud800$x^2$](javascript:0)"


class Page(HTMLParser):
    """Every tag, id and link of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src", "xlink:href"):
                self.links.append(str(value))


def written(folder: Path) -> str:
    return write_report(folder).html.read_text(encoding="utf-8")


def hostile_page(folder: Path) -> str:
    bad = layer(HOSTILE, verdict="wrong", worst={"tensor": HOSTILE, "index": [0], "expected": None, "found": HOSTILE})
    engine = artifact(path=HOSTILE, note=HOSTILE, kept_fp32=((HOSTILE, HOSTILE),), details={HOSTILE: HOSTILE})
    proof = certificate(
        layers=(bad,),
        outputs=(output(model=HOSTILE, output=HOSTILE),),
        graph=graph(differences=(HOSTILE,), added=(HOSTILE,), operators={HOSTILE: 1}),
        versions={HOSTILE: HOSTILE},
    )
    fused = {**FUSED, "checkpoint": {"path": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE]}}, "changed": {HOSTILE: [1]}}
    artifacts = [audited(engine, bitwise=[HOSTILE], precisions={HOSTILE: 1})]
    return written(write(folder, fused=fused, proof=proof, artifacts=artifacts))


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    text = hostile_page(tmp_path)
    parsed = Page(text)
    assert parsed.tags["script"] == 0
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert not [name for name in parsed.attributes if name.startswith("on")]
    assert not set(text) & {"\u202e", "\x00"}


@pytest.mark.parametrize("many", [1, 400])
def test_page_needs_nothing_from_outside(tmp_path: Path, many: int) -> None:
    layers = tuple(layer(f"blocks.{index}") for index in range(many))
    parsed = Page(written(write(tmp_path, proof=certificate(layers=layers), artifacts=[artifact()])))
    assert parsed.tags["script"] == parsed.tags["link"] == parsed.tags["img"] == 0
    assert all(link.startswith("#") for link in parsed.links)
    assert {link[1:] for link in parsed.links} <= set(parsed.ids)
    assert len(parsed.ids) == len(set(parsed.ids))


def test_every_table_has_a_caption_and_headers(tmp_path: Path) -> None:
    parsed = Page(written(write(tmp_path, proof=certificate(), artifacts=[artifact()])))
    assert parsed.tags["table"] == parsed.tags["caption"] == parsed.tags["thead"] == 4
    assert parsed.tags["h1"] == 1


def test_audited_only_is_stated_plainly(tmp_path: Path) -> None:
    engine = audited(artifact(path="model.engine", target="trt", ran=False, outputs=()), novelty=[1, 2])
    text = written(write(tmp_path, proof=certificate(), artifacts=[artifact(), engine]))
    assert "Audited only, not run here" in text
    assert "Run here against the reference" in text
    assert "sum of squares over 65504" in text
    assert "novelty" in text


def test_failed_proof_looks_failed(tmp_path: Path) -> None:
    text = written(write(tmp_path, proof=certificate(layers=(layer("a.b", verdict="wrong"),))))
    assert '<div class="verdict wrong"' in text
    assert '<tr id="layer-1" class="wrong">' in text


def test_lost_change_is_pointed_out(tmp_path: Path) -> None:
    assert "A wider one keeps more" in written(write(tmp_path, proof=certificate(survival=0.5)))


def test_plots_take_their_colours_from_the_page(tmp_path: Path) -> None:
    layers = (layer("a"), layer("b", verdict="rounded"), layer("c", verdict="wrong"))
    for narrow in (False, True):
        for text in (layer_plot(layers, narrow=narrow), output_plot((output(),), narrow=narrow)):
            drawing = ElementTree.fromstring(text)
            assert drawing.get("aria-label")
            assert not re.search(r"#[0-9a-f]{6}", text)
            assert "DejaVu" not in text


def test_each_dot_has_a_tooltip_and_leads_to_its_row() -> None:
    text = layer_plot((layer("a<b>"), layer("c", bound_ratio=float("nan"), survival=float("inf"))), narrow=False)
    assert text.count('<a href="#layer-2"') == 2
    assert "<title>1. a&lt;b&gt;: exact, error 5.9e-9, 0.98 of its bound, 99.99 % kept</title>" in text


def test_only_the_outputs_closest_to_their_bound_are_drawn() -> None:
    outputs = tuple(output(output=f"head{index}", error=1e-9 * (index + 1)) for index in range(60))
    text = output_plot(outputs, narrow=False)
    assert "head59" in text
    assert "head35 " not in text


def test_zero_and_nan_have_places_of_their_own() -> None:
    axis = scale([0.0, 1e-7, 1e-3, float("nan")])
    low, high = axis.limits
    assert low < axis.at(0.0) < axis.at(1e-7) < axis.at(1e-3) < axis.at(float("nan")) < high
    assert [name for _, name in axis.ticks()] == ["0", "1e-7", "1e-6", "1e-5", "1e-4", "1e-3", "NaN, inf"]


def test_an_axis_of_nothing_is_still_an_axis() -> None:
    assert scale([]).limits[0] < scale([float("inf")]).limits[1]
