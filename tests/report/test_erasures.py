"""Audits of erasures in the page against their files."""

import html
import json
import re
import shutil

import pytest
from pages import Page

from conftest import HOSTILE_ID
from memloc_lens.report import ReportSettings, write_report
from memloc_lens.report.command import main
from memloc_lens.report.page import sentence
from memloc_lens.runs.visible import visible


@pytest.fixture(scope="module")
def found(audited) -> dict:
    return json.loads((audited / "audit.json").read_text())


@pytest.fixture(scope="module")
def source(audited, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("page") / "page.html"
    write_report(ReportSettings((audited,), out))
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source) -> Page:
    return Page(source)


@pytest.fixture
def copied(audited, tmp_path):
    """The folder of an erased checkpoint, without the weights."""
    for name in ("audit.json", "erasure.json"):
        (tmp_path / "copied").mkdir(exist_ok=True)
        shutil.copy(audited / name, tmp_path / "copied" / name)
    return tmp_path / "copied"


def rows_of(page: Page, label: str) -> dict[str, dict[str, str]]:
    """Return the rows of a table by their first cells, the other cells by their headings."""
    headings, *rows = [[text for text, _ in row] for row in page.regions[label]]
    return {row[0]: dict(zip(headings, row, strict=True)) for row in rows}


def test_extraction_before_and_after(page, found):
    rows = rows_of(page, "Extraction of the targets, by prompt")
    assert list(rows) == list(found["extraction"])
    for name, states in found["extraction"].items():
        for when, cells in states.items():
            assert rows[name][f"tokens right {when}"] == f"{cells['prefix']['mean']:.1f}"
            assert rows[name][f"strength {when}"] == f"{cells['strength']['mean']:.2f}"
    assert rows["own"]["recited (%) before"] == "100"


def test_relearning_membership_and_damage(page, found):
    headings, *rows = [[text for text, _ in row] for row in page.regions["Relearning, by lesson"]]
    told = {(row[0], row[1]): dict(zip(headings, row, strict=True)) for row in rows}
    for lesson, result in found["relearning"].items():
        for kind, texts in result["relearned"].items():
            steps = sorted(999 if each["steps"] is None else each["steps"] for each in texts.values())
            assert told[lesson, kind]["learned"] == f"{sum(each < 999 for each in steps)} of {len(texts)}"
            assert told[lesson, kind]["steps"] == ("over 5" if steps[(len(steps) - 1) // 2] == 999
                                                   else str(steps[(len(steps) - 1) // 2]))  # fmt: skip
            assert bool(told[lesson, kind]["ratio to erased"]) == (kind != "erased")
    after = found["membership"]["after"]
    assert rows_of(page, "Membership, by signal")["loss"]["AUROC after"] == f"{after['loss']['mean']:.3f}"
    for name, each in found["accuracy"]["groups"].items():
        assert rows_of(page, "Damage, by group")[name]["change"] == f"{each['change']['mean']:+.1f}"
    change = found["perplexity"]["change"]["mean"]
    assert rows_of(page, "Damage, by text")["plain"]["change (%)"] == f"{change:+.2f}"


def test_both_pages_have_the_same_rows(page, audited):
    """Whatever the page in Markdown says is also in the report."""
    blocks = re.findall(r"(?:^\|.*\n)+", (audited / "AUDIT.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    tables = []
    for block in blocks:
        lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines() if "---" not in line]
        cells = [[html.unescape(re.sub(r"\\(.)", r"\1", cell)) for cell in line] for line in lines]
        tables.append([[re.sub(r" \[[^\]]*, [^\]]*\] ?$", "", cell).strip() for cell in row] for row in cells])
    shown = [[[text for text, _ in row] for row in rows] for rows in page.regions.values()]
    assert len(tables) == 10
    for each in tables:
        assert [[cell.replace("\\", "") for cell in row] for row in each] in [
            [[cell.replace("\\", "") for cell in row] for row in rows] for rows in shown
        ]


def test_what_was_not_tried_is_last(page, found):
    headings = [text for text in page.text.splitlines() if text in ("Relearning", "Pictures", "What was not tried")]
    assert headings == ["Relearning", "Pictures", "What was not tried"]
    last = page.text.split("What was not tried")[1]
    assert all(what in last for what in found["not_tried"])


def test_what_was_erased_and_at_what_cost(page, audited):
    told = json.loads((audited / "erasure.json").read_text())
    assert f"{told['count']} of {told['of']} (" in page.text
    assert "neurons set to zero" in page.text
    costs = rows_of(page, "What was erased, by cost")
    assert list(costs) == ["accuracy of other sequences"]  # no text was measured
    (cost,) = costs.values()
    assert (cost["before"], cost["after"]) == tuple(f"{told[when]['accuracy']:.2f}" for when in ("before", "after"))
    assert cost["allowed"] == "-100 points"
    rows = rows_of(page, "What was erased, by sequence")
    for target in told["targets"]:
        row = rows[visible(target["id"])]
        assert int(row["after"]) == max(target["after"].values()) == target["after"][row["asked by"]]
        assert int(row["after"]) < int(row["extracted from"]) <= int(row["tokens in one piece before"])


def test_hostile_text_stays_text(source, page):
    ids = [attributes.get("id") for attributes, _ in page.scripts]
    assert ids == ["data", "library-plotly", "library-circuitsvis", None]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not {"i", "img", "link"} & {tag for tag, _ in page.elements}
    assert visible(HOSTILE_ID) in page.text
    assert "Erasure: <i>erased" in page.text
    assert "\u202e" not in source.split('id="library-plotly"')[0]
    assert f"erased: {visible(HOSTILE_ID)}" in [row[0][0] for row in page.regions[
        "Numbers of: Relearning from the text itself"]]  # fmt: skip
    figures = json.loads(page.scripts[0][1])[0]["figures"]
    assert list(figures) == ["relearning-itself", "relearning-half", "relearning-related"]


def test_names_in_a_file_stay_text(copied, tmp_path):
    """An audit may come from somebody else: no name in it makes a file or an element."""
    found = json.loads((copied / "audit.json").read_text())
    found["relearning"]["../../<b>lesson"] = found["relearning"]["itself"]
    found["measured"]["damage"] = "`<b>` and <b>more"
    found["not_tried"] = ["<b>"]
    found["accuracy"]["categories"]["<b>"] = found["accuracy"]["groups"]["controls"]
    found["provenance"]["<b>"] = "<b>"
    (copied / "audit.json").write_text(json.dumps(found))
    write_report(ReportSettings((copied,), tmp_path / "page.html", figures=tmp_path / "figures"))
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "b" not in [tag for tag, _ in page.elements]
    assert "Measured: <b> and <b>more" in page.text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copied", "figures", "page.html"]
    names = {f"relearning-{lesson}.{end}" for lesson in ("itself", "half", "related") for end in ("svg", "png")}
    assert {file.name for file in (tmp_path / "figures" / "copied").iterdir()} == names


def test_beside_a_run_on_the_command_line(whole_inj, copied, tmp_path, monkeypatch, capsys):
    (copied / "erasure.json").unlink()
    out = tmp_path / "page.html"
    monkeypatch.setattr("sys.argv", ["report", str(whole_inj.out), str(copied), "-o", str(out)])
    main()
    assert "report:" in capsys.readouterr().out
    page = Page(out.read_text(encoding="utf-8"))
    assert "INJ: whole" in page.text
    assert "Erasure: copied" in page.text
    assert "erasure.json is not in the folder" in page.text
    run, erasure = json.loads(page.scripts[0][1])
    assert list(run["figures"]) == ["recall-0.2"]
    assert "relearning-itself" in erasure["figures"]


def test_an_erasure_of_components_alone(copied, tmp_path):
    """`write_checkpoint` tells no more than what was set to zero."""
    told = json.loads((copied / "erasure.json").read_text())
    kept = {name: told[name] for name in ("component", "count", "of", "layers", "left_out")}
    (copied / "erasure.json").write_text(json.dumps(kept))
    write_report(ReportSettings((copied,), tmp_path / "page.html"))
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert f"{told['count']} of {told['of']} (" in page.text
    assert not [label for label in page.regions if label.startswith("What was erased")]


def test_what_is_refused(copied, tmp_path):
    settings = ReportSettings((copied,), tmp_path / "page.html")
    (copied / "erasure.json").write_text(json.dumps({"component": "neuron"}))
    with pytest.raises(ValueError, match=r"erasure\.json is damaged: KeyError\('count'\); remove it"):
        write_report(settings)
    found = json.loads((copied / "audit.json").read_text())
    for change in ({"relearning": []}, {"extraction": {"own": {}}}, {"perplexity": {"before": 1}}):
        (copied / "audit.json").write_text(json.dumps(found | change))
        with pytest.raises(ValueError, match=r"audit\.json is damaged: .*; audit the checkpoint again"):
            write_report(settings)
    (copied / "audit.json").unlink()
    with pytest.raises(ValueError, match=rf"holds no audit of an erasure .* memloc audit ORIGINAL .*{copied.name}"):
        write_report(settings)
    assert not settings.out.exists()


def test_a_sentence_in_place_of_a_picture_names_no_single_text(page):
    labels = [attributes["aria-label"] for _, attributes in page.elements if attributes.get("role") == "img"]
    assert len(labels) == 3
    kinds = "erased, 2 texts, new, 2 texts, retrained, 2 texts, limit: half of the suffix"
    assert labels[0].startswith("Chart of tokens right (% of the limit) against steps of fine-tuning, of ")
    assert labels[0].endswith(f", of {kinds}. Relearning from the text itself")


def test_sentences():
    assert sentence("`a` & `<b>\u202e` `") == r"<code>a</code> &amp; <code>&lt;b&gt;\u202e</code> `"
