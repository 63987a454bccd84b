"""A report is one page that needs nothing else, whatever names the rows hold."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest

from mitaswap.errors import MitaswapError
from mitaswap.report import _write, write_report
from mitaswap.report._drawings import inline
from mitaswap.report._table import Table
from mitaswap.report._taxonomy import taxonomy_table
from mitaswap.results import Run, provenance

EVIL = '<script>alert("x")</script>'


def rows(model: str = "tiny", data: str = "digits") -> list[dict[str, Any]]:
    here = {
        "model": model,
        "data": data,
        "split": "test",
        "images": 1000,
        "trained_with": "standard",
    }
    settings = {"img_size": 16, "dtype": "float32", "device": "cpu", "seed": 3, "batch_size": 64}
    found: list[dict[str, Any]] = [
        {
            **here,
            **settings,
            "study": "matrix",
            "run_with": spec,
            "mechanism": spec.partition("(")[0],
            "top1": top1,
            "top1_low": top1 - 2,
            "top1_high": top1 + 2,
            "correct": int(10 * top1),
            "loss": 0.25,
        }
        for spec, top1 in (("standard", 90.0), ("mita(m=4,k=4)", 89.1), ("linear", 45.0))
    ]
    found += [
        {
            **here,
            "study": "grid",
            "run_with": f"mita(m={m},k={k})",
            "mechanism": "mita",
            "axis_N": m,
            "axis_N_name": "m",
            "axis_K": k,
            "axis_K_name": "k",
            "top1": top1,
        }
        for m, k, top1 in ((1, 1, 30.0), (1, 4, 60.0), (4, 1, 70.0), (4, 4, 89.1), (9, 4, 90.5))
    ]
    found += [
        {
            **here,
            "study": "overlap",
            "statistic": "overlap",
            "run_with": "mita(m=4,k=4)",
            "layer": layer,
            "path": f"blocks.{layer}.attn",
            "head": 0,
            "value": value,
            "low": 0.0,
            "high": 0.5,
            "chance": 0.03,
        }
        for layer, value in enumerate((0.31, 0.02))
    ]
    return found


def with_cards(**names: str) -> list[dict[str, Any]]:
    """Rows of the study matrix that carry costs and taxonomy cards."""
    cards = {
        "standard": ("none (N-wide MLP)", "N^2 d", "usable", 0.18),
        "topk(k=9)": ("routing", "N^2 d", "usable", 0.13),
        "bra(n=4)": ("routing", "n^2 d + N (N / n) k d", "usable", 0.06),
        "mita(m=4,k=4)": ("compression & routing", "N (m + k s) d", "usable", 0.08),
        "mita(m=4,k=4)+dwc": ("compression & routing", "N (m + k s) d", "usable", 0.09),
        "linear": ("compression", "N d^2", "needs finetuning", 0.05),
    }
    first = rows(**names)[0]
    return [
        {
            **first,
            "run_with": spec,
            "mechanism": spec.replace("(m=4,k=4)", "").partition("(")[0],
            "top1": 90.0 - 5 * number,
            "top1_low": 88.0 - 5 * number,
            "top1_high": 91.0 - 5 * number,
            "gmacs": 1.08 + cores,
            "attn_gmacs": cores,
            "param_count": 5.7 + (0.1 if "dwc" in spec else 0.0),
            "strategy": strategy,
            "expert_type": "MLP",
            "expert_count": "N / block^2",
            "construction": "a|b",
            "topology": "all-to-one",
            "source": f"{EVIL}, arXiv 2602.01219; v2: arXiv 2106.13797",
            "cost": cost,
            "untrained": untrained,
        }
        for number, (spec, (strategy, cost, untrained, cores)) in enumerate(cards.items())
    ]


MakeRun = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> MakeRun:
    def make(name: str = "run", study: str | None = None, **names: str) -> Path:
        return make_run(tmp_path / name, study, **names)

    return make


def make_run(directory: Path, study: str | None = None, **names: str) -> Path:
    """A run with all rows, or only those of one study, which is faster to draw."""
    plan = {"models": [names.get("model", "tiny")], "note": EVIL}
    with Run.open(directory, plan, provenance("Some CPU", "float32", 3)) as opened:
        opened.append("all", [row for row in rows(**names) if study in (None, row["study"])])
    return directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a whole report, for tests that only read it."""
    here = tmp_path_factory.mktemp("whole")
    return write_report([make_run(here / "run")], here / "out")


class Page(HTMLParser):
    """What a browser would load, run and show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_report_is_complete(whole: Path) -> None:
    path = whole
    assert path.parts[-2:] == ("out", "index.html")
    files = {str(p.relative_to(path.parent)) for p in path.parent.rglob("*") if p.is_file()}
    stems = ["matrix-digits-test", "grid-tiny-mita", "overlap-tiny-mita-m-4-k-4"]
    stems += ["accuracy-digits-test"]
    drawn = {f"figures/{name}.{kind}" for name in stems for kind in ("svg", "png")}
    assert files == {"index.html", "report.md", "rows.csv", *drawn}
    assert sorted(p.name for p in path.parent.parent.iterdir()) == ["out", "run"]
    assert path.stat().st_size < 1_000_000
    assert len(pd.read_csv(path.parent / "rows.csv")) == len(rows())
    page = page_of(path)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "ids of one drawing must not meet those of another"
    for word in ("Some CPU", "float32", "pandas", "How every number was made", "Wilson"):
        assert word in page.text


def test_summary_numbers_are_those_of_the_rows(whole: Path) -> None:
    text = " ".join(page_of(whole).text.split())
    assert "1 trained model and 3 mechanisms, 3 combinations, measured on digits, test" in text
    assert (
        "keeps most accuracy: tiny, trained with standard and run with mita(m=4,k=4), has 89.1% "
        "instead of 90.0%, 99.0% of it (95% intervals overlap)" in text
    )
    assert (
        "keeps least accuracy: tiny, trained with standard and run with linear, has 45.0%" in text
    )
    assert "50.0% of it (95% intervals do not overlap)" in text
    assert (
        "tiny with mita: 5 settings, the best is m = 9, k = 4 with 90.5%; 1 reaches the baseline "
        "of 90.0% and 2 reach 99% of it, with the smallest m + k at m = 4, k = 4" in text
    )
    assert "in layer 1 (mean IoU 0.310, chance 0.030) and least in layer 2 (0.020)" in text
    assert "90.00 (88.00 to 92.00)" in text


def test_page_needs_nothing_else(whole: Path) -> None:
    path, page = whole, page_of(whole)
    for tag in ("script", "link", "iframe", "object", "base", "source"):
        assert page.all(tag) == []
    loaded = [a.get("src") for _, a in page.tags if "src" in a]
    loaded += [a.get(key) for t, a in page.tags if t != "a" for key in ("href", "xlink:href")]
    assert all(url is None or url.startswith(("data:image/png", "#")) for url in loaded)
    styles = re.findall(r"url\((.*?)\)", path.read_text(encoding="utf-8"))
    assert styles and all(url.startswith("#") for url in styles)
    policy = [m.get("content") for m in page.all("meta") if "http-equiv" in m]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    targets = {a.get("id") for _, a in page.tags}
    saved = {}
    for link in page.all("a"):
        href = link["href"] or ""
        if href.startswith("#"):
            assert href[1:] in targets, href
        else:  # works when the page is sent alone
            kind, _, data = href.partition(";base64,")
            saved[link["download"]] = (kind, base64.b64decode(data, validate=True))
    files = {"rows.csv": ("data:text/csv", (path.parent / "rows.csv").read_bytes())}
    for svg in (path.parent / "figures").glob("*.svg"):
        files[svg.name] = ("data:image/svg+xml", svg.read_bytes())
    assert len(files) == 5 and saved == files


def test_files_that_would_make_the_page_too_large_are_named(
    run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = run(study="overlap")
    small = write_report([directory], tmp_path / "small")
    drawn = 2 * (small.parent / "figures" / "overlap-tiny-mita-m-4-k-4.svg").stat().st_size
    monkeypatch.setattr(_write, "_ROOM", drawn + 10_000)  # enough for the rows
    page = page_of(write_report([directory], tmp_path / "large"))
    links = [link for link in page.all("a") if not (link["href"] or "").startswith("#")]
    assert [link["download"] for link in links] == ["rows.csv"]
    words = " ".join(page.text.split())
    assert "In the report's directory: figures/overlap-tiny-mita-m-4-k-4.svg, figures/" in words
    monkeypatch.setattr(_write, "_ROOM", 0)
    page = page_of(write_report([directory], tmp_path / "none"))
    assert all((link["href"] or "").startswith("#") for link in page.all("a"))
    assert "below: rows.csv in the report's directory." in " ".join(page.text.split())


def test_page_is_accessible(whole: Path) -> None:
    page = page_of(whole)
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1 and len(page.all("main")) == 1
    assert all(th.get("scope") in ("col", "row") for th in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) > 0
    drawings = page.all("svg")
    assert len(drawings) == 2 * 4, "every drawing in a light and a dark version"
    assert all(d["role"] == "img" and len(d["aria-label"] or "") > 40 for d in drawings)


@pytest.mark.parametrize("where", ["model", "data"])
def test_names_are_text_everywhere(run: MakeRun, tmp_path: Path, where: str) -> None:
    path = write_report([run(**{where: EVIL})], tmp_path / "out")
    page = page_of(path)
    assert page.all("script") == []
    assert EVIL in page.text, "shown as it is"
    assert "<script" not in path.read_text(encoding="utf-8")
    assert "<script" not in (path.parent / "report.md").read_text(encoding="utf-8")
    for svg in (path.parent / "figures").glob("*.svg"):
        tags = {element.tag for element in ElementTree.parse(svg).iter()}
        assert not any("script" in tag for tag in tags)


@pytest.mark.parametrize("model", ["../../x", "/etc/passwd", "a\\..\\b", "", "con\x00\x1b\ud800"])
def test_no_name_leaves_the_output_directory(run: MakeRun, tmp_path: Path, model: str) -> None:
    directory = run(study="overlap", model=model)
    before = {p for p in tmp_path.rglob("*")}
    path = write_report([directory], tmp_path / "deep" / "out")
    new = {p for p in tmp_path.rglob("*")} - before - {tmp_path / "deep"}
    assert all(p == path.parent or path.parent in p.parents for p in new)
    for svg in path.parent.rglob("*.svg"):
        ElementTree.parse(svg)


def test_markdown_tables_survive_pipes_and_newlines(run: MakeRun, tmp_path: Path) -> None:
    path = write_report([run(model="a|b\nc*d")], tmp_path / "out")
    text = (path.parent / "report.md").read_text(encoding="utf-8")
    tables = [block for block in text.split("\n\n") if block.lstrip().startswith("|")]
    assert len(tables) == 8, "four of the page and one for each figure"
    for table in tables:
        lines = table.strip().splitlines()
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(lines) >= 3 and len(widths) == 1, table
    assert "a\\|b c\\*d" in text
    for image in re.findall(r"!\[.*?\]\((figures/[^)]+)\)", text):
        assert (path.parent / image).is_file()
    assert text.count("![") == 4


def test_runs_are_shown_together_with_the_provenance_of_each(run: MakeRun, tmp_path: Path) -> None:
    path = write_report(
        [run("first", "matrix"), run("second", "matrix", model="other")], tmp_path / "out"
    )
    page = page_of(path)
    assert "Run first" in page.text and "Run second" in page.text
    assert "2 trained models and 3 mechanisms, 6 combinations" in " ".join(page.text.split())


def test_what_was_measured_twice_is_said(run: MakeRun, tmp_path: Path) -> None:
    text = page_of(
        write_report([run("first", "grid"), run("second", "grid")], tmp_path / "out")
    ).text
    assert "5 rows measured more than once" in text


def test_the_same_rows_give_the_same_files(run: MakeRun, tmp_path: Path) -> None:
    directory = run(study="matrix")
    first, second = (write_report([directory], tmp_path / name).parent for name in ("a", "b"))
    for file in first.rglob("*.*"):
        assert file.read_bytes() == (second / file.relative_to(first)).read_bytes(), file.name


def test_an_earlier_report_is_replaced_and_nothing_stale_stays(
    run: MakeRun, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_report([run("first", "overlap", model="old")], out)
    assert (out / "figures" / "overlap-old-mita-m-4-k-4.svg").exists()
    path = write_report([run("second", "overlap", model="new")], out)
    assert not (out / "figures" / "overlap-old-mita-m-4-k-4.svg").exists()
    assert "new" in page_of(path).text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "out", "second"]


def test_a_report_may_lie_in_its_run(run: MakeRun) -> None:
    directory = run(study="overlap")
    for _ in range(2):
        assert write_report([directory], directory / "report").is_file()


@pytest.mark.parametrize("place", ["thesis.tex", "figures/photo.jpg"])
def test_other_peoples_files_are_never_replaced(run: MakeRun, tmp_path: Path, place: str) -> None:
    out = tmp_path / "out"
    directory = run(study="overlap")
    write_report([directory], out)
    (out / place).write_text("mine")
    with pytest.raises(MitaswapError, match=r"holds something that is no report .*-o"):
        write_report([directory], out)
    assert (out / place).read_text() == "mine"


def test_a_page_of_another_program_is_never_replaced(run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index.html").write_text("<html>mine</html>")
    with pytest.raises(MitaswapError, match=r"no report of mitaswap \(index\.html\)"):
        write_report([run(study="overlap")], tmp_path / "out")
    with pytest.raises(MitaswapError, match="is a file"):
        write_report([run("other")], tmp_path / "out" / "index.html")


def test_a_failed_report_leaves_the_earlier_one(
    run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    directory = run(study="overlap")
    write_report([directory], out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_csv", full)
        with pytest.raises(MitaswapError, match=r"cannot write the report .*No space left .*-o"):
            write_report([directory], out)
    rename = os.replace

    def fail_last(source: Any, target: Any) -> None:
        if str(source).endswith(".partial"):
            raise OSError(5, "I/O error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(_write.os, "replace", fail_last)
        with pytest.raises(MitaswapError, match="I/O error"):
            write_report([directory], out)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_rows_without_a_figure_still_make_a_page(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", {}, {}) as opened:
        opened.append("a", [{"study": "latency", "seconds": 1.5}])
    page = page_of(write_report([tmp_path / "run"], tmp_path / "out"))
    assert "The runs hold 1 rows and no accuracy" in page.text
    assert "not recorded" in page.text and page.all("svg") == []


def test_what_is_no_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(MitaswapError, match="is not a directory"):
        write_report([tmp_path / "nowhere"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_inline_svg_renames_ids_but_never_text() -> None:
    svg = (
        '<?xml version="1.0"?>\n<svg width="1pt"><metadata>x</metadata><g id="a" '
        'clip-path="url(#a)"><use href="#a"/><b id="a"/><text>id="b" url(#c)</text></g></svg>'
    )
    assert inline(svg, "p-", 'a "b" <c>') == (
        '<svg role="img" aria-label="a &#34;b&#34; &lt;c&gt;" width="1pt"><g id="p-a" '
        'clip-path="url(#p-a)"><use href="#p-a"/><b id="p-a-2"/>'
        '<text>id="b" url(#c)</text></g></svg>'
    )


def test_tables_show_missing_values_as_dashes_and_lift_a_common_setting() -> None:
    frame = pd.DataFrame({"a": ["x", None], "b": [1.0, None], "c": [1234, 5], "Data": ["d", "d"]})
    table = Table.of(frame)
    assert (table.head, table.data) == (["a", "b", "c"], ", on d")
    assert table.rows == [["x", "1.00", "1,234"], ["–", "–", "5"]]
    assert table.right == [False, True, True]
    assert Table.of(frame.assign(Data=["d", "e"])).head[-1] == "Data"


def test_decimals_may_differ_by_column() -> None:
    table = Table.of(pd.DataFrame({"GMACs": [1.0796], "top": [73.149]}), {"GMACs": 3})
    assert table.rows == [["1.080", "73.15"]]
    assert Table.of(pd.DataFrame({"a": [0.12345]}), 3).rows == [["0.123"]]


def test_mechanisms_stand_in_one_table_by_strategy_and_name(tmp_path: Path) -> None:
    found = with_cards()
    recipe = {**found[0], "run_with": "0: linear; *: agent", "mechanism": "several"}
    earlier = {**found[1], "strategy": "compression"}
    other = {**found[3], "run_with": "mita(m=9,k=9)"}
    table = taxonomy_table(pd.DataFrame([earlier, *found, other, recipe]))
    assert [*table["Mechanism"]] == ["standard", "linear", "bra", "topk", "mita", "mita+dwc"]
    assert table.iloc[2]["Order of operations"] == "n² d + N (N / n) k d"
    assert [*table.columns[1:3]] == ["Strategy", "Expert type"]
    assert set(table["Experts"]) == {"N / block²"}
    with Run.open(tmp_path / "run", {}, {}) as opened:
        opened.append("all", [*found, recipe])
    path = write_report([tmp_path / "run"], tmp_path / "out")
    page = page_of(path)
    assert "#mechanisms" in [link["href"] for link in page.all("a")]
    assert page.all("script") == [] and page.text.count(EVIL) >= 6, "sources are text"
    outside = {link["href"] for link in page.all("a") if "://" in (link["href"] or "")}
    assert outside == {"https://arxiv.org/abs/2602.01219", "https://arxiv.org/abs/2106.13797"}
    text = (path.parent / "report.md").read_text(encoding="utf-8")
    row = "| linear | compression | MLP | N / block² | a\\|b | all-to-one | N d² |"
    assert "## Mechanisms" in text and row in text
    assert "<script" not in text


def test_cost_and_ranking_are_part_of_the_report(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", {}, {}) as opened:
        opened.append("all", with_cards(model=EVIL))
    path = write_report([tmp_path / "run"], tmp_path / "out")
    page = page_of(path)
    sections = [link["href"] for link in page.all("a") if link["href"] is not None]
    shown = [href for href in sections if href.startswith("#figure-")]
    assert shown == ["#figure-matrix", "#figure-ranking", "#figure-pareto"]
    assert page.all("script") == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    labels = [svg["aria-label"] or "" for svg in page.all("svg")]
    assert any("Pareto front from the cheapest: linear (0.05 GMACs" in label for label in labels)
    assert "5.700\u00a0to\u00a05.800" in page.text, "mechanisms with parameters of their own"


def test_rows_without_cards_have_no_table_of_mechanisms(whole: Path) -> None:
    assert taxonomy_table(pd.DataFrame(rows())).empty
    assert taxonomy_table(pd.DataFrame({"study": ["latency"]})).empty
    assert "mechanisms" not in {a.get("id") for _, a in page_of(whole).tags}
    assert "## Mechanisms" not in (whole.parent / "report.md").read_text(encoding="utf-8")


def test_report_loads_no_torch(run: MakeRun, tmp_path: Path) -> None:
    script = (
        "import sys; from mitaswap.report import write_report; write_report([sys.argv[1]], "
        "sys.argv[2]); assert not {'torch', 'timm', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", script, str(run(study="overlap")), str(tmp_path / "out")]
    subprocess.run(command, check=True)
