import json
import shutil

import pytest
from pages import HOSTILE, Page, hostile_run

from memloc_lens import load_model, load_sequences, top_neurons
from memloc_lens.benchmarks import deletion
from memloc_lens.plots.forgetting import forgetting_figure
from memloc_lens.report import ReportSettings, write_report
from memloc_lens.report.cards import differing, sequence_cards
from memloc_lens.report.command import main
from memloc_lens.report.neurons import BASELINES, NeuronCard, neuron_cards
from memloc_lens.report.page import RunSection, render
from memloc_lens.report.pictures import Missing, alternative, pictures, table
from memloc_lens.report.summaries import tables
from memloc_lens.runs.finished import read_run
from memloc_lens.runs.visible import visible


@pytest.fixture(scope="session")
def both(whole_del, whole_inj, tmp_path_factory) -> Page:
    """The page of a DEL and an INJ run."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    write_report(ReportSettings((whole_del.out, whole_inj.out), out, device="cpu"))
    return Page(out.read_text(encoding="utf-8"))


def test_the_numbers_are_those_of_the_summaries(both, whole_del, whole_inj):
    checked = 0
    for settings, title in (
        (whole_del, "{:g}% of each layer's neurons"),
        (whole_inj, "Injected into {:g}% of all neurons"),
    ):
        summary = json.loads((settings.out / "summary.json").read_text())
        for ratio in {ratio for cells in summary["methods"].values() for ratio in cells}:
            headings, *rows = both.tables[title.format(100 * float(ratio))]
            by_name = {row[0][0]: dict(zip([text for text, _ in headings], row, strict=True)) for row in rows}
            assert by_name.keys() - {"before"} == summary["methods"].keys()
            for method, cells in summary["methods"].items():
                means = [cell["mean"] for cell in cells[ratio].values()]
                for heading, (text, value) in by_name[method].items():
                    if heading != "method" and text:
                        assert float(value) in means
                        assert float(text) == pytest.approx(float(value), abs=0.051)
                        checked += 1
            first, name = ("Self-Acc", "self_acc") if settings is whole_del else ("AUROC", "auroc")
            for method, cells in summary["methods"].items():
                assert float(by_name[method][first][1]) == cells[ratio][name]["mean"]
    assert checked > 100


def test_the_best_of_a_column_is_marked(whole_del):
    run = read_run(whole_del.out, "del")
    (first, *_) = tables(run)
    accuracies = {row.name: row.cells[0] for row in first.rows if row.kind == "method"}
    best = min(cell.value for cell in accuracies.values())
    assert [cell.best for cell in accuracies.values()] == [cell.value == best for cell in accuracies.values()]


def test_what_was_run_is_told(both, whole_del):
    assert str(whole_del.model) in both.text
    for part in ("commit", "command", "machine", "first_layer", "penalty"):
        assert part in both.text


def test_everything_is_inside(both):
    """Nothing is named that a browser would fetch, and each library is there once."""
    for tag, attributes in both.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed")
        assert not {"src", "srcset", "data", "background"} & attributes.keys()
        assert attributes.get("href", "#").startswith("#")
    ids = [attributes.get("id") for attributes, _ in both.scripts]
    assert ids == ["data", "library-plotly", "library-circuitsvis", None]


def test_pictures_have_a_sentence_and_their_numbers(whole_del, both):
    found = pictures(read_run(whole_del.out, "del"), 0.5)
    assert not [each for each in found if isinstance(each, Missing)]
    for picture in found:
        assert len(picture.alternative) > 40
        assert len(picture.table) > 2
        assert len({len(line) for line in picture.table}) == 1
    images = [attributes for tag, attributes in both.elements if attributes.get("role") == "img"]
    assert {picture.alternative for picture in found} <= {image["aria-label"] for image in images}


def test_the_numbers_behind_a_heat_map(whole_del):
    run = read_run(whole_del.out, "del")
    figure = forgetting_figure(whole_del.out, "s1", ratio=0.5)
    headings, before, *_ = table(figure)
    assert len(headings) == 1 + len(run.before["s1"]["probabilities"])
    assert before[0] == "before"
    assert [float(value) for value in before[1:]] == pytest.approx(run.before["s1"]["probabilities"], abs=1e-3)
    assert alternative(figure).startswith("Heat map of")


def test_an_old_run_has_no_texts_and_says_so(whole_del, tmp_path):
    old = shutil.copytree(whole_del.out, tmp_path / "old")
    lines = [json.loads(line) for line in (old / "records.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("probabilities", "written", "crc32"):
            line.pop(name, None)
    (old / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(ReportSettings((old,), tmp_path / "old.html", device="cpu"))
    assert "Forgetting token by token: not shown, because" in Page((tmp_path / "old.html").read_text()).text


def test_cards_hold_what_records_say(whole_del, recited):
    run, model = read_run(whole_del.out, "del"), load_model(whole_del.model, device="cpu")
    cards = sequence_cards(run, model)
    sequences = load_sequences(model, whole_del.data)
    assert [card["id"] for card in cards] == ["s0", "s1", "s2"]
    record = run.at("gradient", 0.5)["s1"]
    state = cards[1]["after"]["gradient"]["0.5"]
    assert state["percent"] == [round(100 * value) for value in record["probabilities"]]
    assert state["written"].split() == [str(token) for token in record["written"]]  # the model has no tokenizer
    assert (state["self"], state["neg"]) == (record["self_acc"], record["neg_acc"])
    assert "".join(cards[1]["suffix"]).split() == [str(token) for token in sequences[1].suffix.tolist()]
    assert cards[1]["before"]["wrong"] == []


def test_texts_are_decoded(embedded, tmp_path):
    settings = deletion.DeletionSettings(
        methods=("activations",), limit=1, negatives=2, controls=2, text_tokens=128, ratios=(0.1,), device="cpu",
        out=tmp_path / "run",
    )  # fmt: skip
    deletion.run(settings)
    run = read_run(settings.out, "del")
    (card,) = sequence_cards(run, embedded)
    assert "".join(card["prompt"] + card["suffix"]) == load_sequences(embedded)[0].text(embedded)
    state = card["after"]["activations"]["0.1"]
    kept = [character for index, character in enumerate(state["written"])
            if not any(start <= index < stop for start, stop in state["wrong"])]  # fmt: skip
    rest = iter("".join(card["suffix"]))
    assert all(character in rest for character in kept)  # what is not marked is in the text, in its order
    assert sum(stop - start for start, stop in state["wrong"]) > 0
    neurons = neuron_cards(run, embedded, 0.1, count=3)
    for neuron in neurons:
        row = embedded.blocks[neuron.layer].mlp.W_out[neuron.neuron]
        raised = embedded.tokenizer.decode([int((row @ embedded.W_U).argmax())])
        assert neuron.raised[0] == visible(raised)
        assert neuron.norm == pytest.approx(row.norm().item(), rel=1e-5)
        assert not neuron.massive


def test_neurons_are_those_that_most_methods_and_sequences_name(whole_del, recited):
    run, model = read_run(whole_del.out, "del"), load_model(whole_del.model, device="cpu")
    counts: dict = {}
    for method in set(run.methods) - set(BASELINES):
        scores = [row for start in (0, 2) for row in run.scores(method, start)["scores"]]
        for row in scores:
            for index in top_neurons(row, 0.1, first_layer=1).indices():
                counts[index] = counts.get(index, 0) + 1
    cards = neuron_cards(run, model, 0.1, count=5)
    found = [sum(map(len, card.named.values())) for card in cards]
    assert found == sorted(counts.values(), reverse=True)[:5]
    assert all(counts[card.layer, card.neuron] == count for card, count in zip(cards, found, strict=True))
    # the highest activation over all targets, by hand
    card = cards[0]
    highest = []
    for sequence in load_sequences(model, whole_del.data)[:3]:
        _, cache = model.run_with_cache(sequence.tokens[None])
        highest.append(cache[f"blocks.{card.layer}.mlp.hook_post"][0, :, card.neuron].max().item())
    assert card.firings[0].activation == pytest.approx(max(highest), rel=1e-5)


@pytest.mark.parametrize(
    ("written", "wanted", "expected"),
    [("abc", "abc", []), ("", "abc", []), ("abc", "", [[0, 3]]), ("axc", "abc", [[1, 2]]), ("aé漢c", "ac", [[1, 3]])],
)
def test_differing_characters(written, wanted, expected):
    assert differing(written, wanted) == expected


def test_hostile_text_stays_text(small_del, tmp_path):
    run = hostile_run(small_del, tmp_path)
    write_report(ReportSettings((run,), tmp_path / "page.html", device="cpu"))
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert source.isprintable() or not set("\u202e\u2028\x00") & set(source.split('id="library-plotly"')[0])
    page = Page(source)
    assert [attributes.get("id") for attributes, _ in page.scripts] == [
        "data", "library-plotly", "library-circuitsvis", None,
    ]  # fmt: skip
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    for text in HOSTILE[:5]:
        assert visible(text) in page.text
    cards = json.loads(page.scripts[0][1])[0]["cards"]
    assert [card["id"] for card in cards] == [visible(text) for text in HOSTILE]


def test_a_page_of_many_cards_is_small():
    """100 sequences, 8 methods and 3 shares, with texts of 200 characters."""
    state = {
        "self": -10.0,
        "neg": -1.0,
        "percent": [50] * 48,
        "written": "word " * 40,
        "wrong": [[0, 3], [10, 20]] * 10,
    }
    after = {f"method-{index}": dict.fromkeys(("0.01", "0.05", "0.1"), state) for index in range(8)}
    card = {"category": "text", "prompt": [" word"] * 32, "suffix": [" word"] * 48, "before": state, "after": after}
    about = {"facts": {}, "methods": {}, "made": []}
    neurons = [NeuronCard(1, index, {"method-0": ["a"]}) for index in range(24)]
    section = RunSection("run", "del", about, [], [], [{"id": f"s{i}"} | card for i in range(100)], neurons)
    page = render([section])
    assert len(page.encode()) < 15e6
    assert len(json.loads(Page(page).scripts[0][1])[0]["cards"]) == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(runs=()), "no run was given"),
        (dict(neurons=-1), "neurons is -1"),
        (dict(ratio=0.3), r"has no records at the ratio 0\.3; it has 0\.1, 0\.5"),
    ],
)
def test_bad_settings_are_one_error(whole_del, change, message, tmp_path):
    given = dict(runs=(whole_del.out,), out=tmp_path / "page.html", device="cpu") | change
    with pytest.raises(ValueError, match=message):
        write_report(ReportSettings(**given))


def test_a_folder_that_holds_no_run(tmp_path):
    with pytest.raises(ValueError, match="holds no finished run"):
        write_report(ReportSettings((tmp_path,), tmp_path / "page.html"))
    with pytest.raises(ValueError, match="a folder; give the file"):
        ReportSettings((tmp_path,), tmp_path)


def test_the_command_line(whole_inj, tmp_path, monkeypatch, capsys):
    out = tmp_path / "sub" / "page.html"
    arguments = ["report", str(whole_inj.out), "-o", str(out), "--figures", str(tmp_path / "figures")]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    assert "report:" in capsys.readouterr().out
    assert out.stat().st_size > 1e6
    saved = sorted(file.name for file in (tmp_path / "figures").rglob("*.*"))
    assert saved == ["recall-0.2.png", "recall-0.2.svg"]


def test_without_the_model(whole_del, tmp_path):
    shutil.copytree(whole_del.out, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"model": "/gone"}))
    write_report(ReportSettings((tmp_path / "run",), tmp_path / "page.html", without_model=True))
    assert "Sequences" not in [
        heading.strip() for heading in Page((tmp_path / "page.html").read_text()).text.split("\n")
    ]
    with pytest.raises(ValueError, match="gone"):
        write_report(ReportSettings((tmp_path / "run",), tmp_path / "page.html"))
