"""Curves of relearning against numbers worked out from the audit."""

import json
from statistics import fmean

import pytest

from conftest import HOSTILE_ID
from memloc_lens.plots import relearning_figure, save_figure
from memloc_lens.plots.drawing import drawn


@pytest.fixture
def changed(audited, tmp_path):
    """A function that writes an audit anew with parts changed."""

    def change(**parts):
        folder = tmp_path / "changed"
        folder.mkdir()
        found = json.loads((audited / "audit.json").read_text())
        (folder / "audit.json").write_text(json.dumps(found | parts))
        return folder

    return change


def curve(limit: int, *prefixes: int, every: int = 1) -> dict:
    points = [{"step": every * index, "prefix": prefix, "loss": 1.0} for index, prefix in enumerate(prefixes)]
    return {"steps": None, "max_steps": 9, "limit": limit, "curve": points}


def test_means_and_single_texts(audited):
    relearned = json.loads((audited / "audit.json").read_text())["relearning"]["half"]["relearned"]
    figure = relearning_figure(str(audited), "half")
    lines = {trace.name: trace for trace in figure.data}
    assert list(lines)[:4] == ["erased, 2 texts", "new, 2 texts", "retrained, 2 texts", "limit: half of the suffix"]
    last = max(point["step"] for texts in relearned.values() for each in texts.values() for point in each["curve"])
    for kind, texts in relearned.items():
        filled = []
        for each in texts.values():
            values = []  # one a step, the last one going on
            for step in range(last + 1):
                values += [point["prefix"] for point in each["curve"] if point["step"] == step] or values[-1:]
            filled.append([100 * value / each["limit"] for value in values])
        line = lines[f"{kind}, 2 texts"]
        assert set(line.x) >= {point["step"] for each in texts.values() for point in each["curve"]}
        assert line.x[-1] == last
        assert line.y == pytest.approx([fmean(each[step] for each in filled) for step in line.x])
    single = lines["erased: s1"]
    assert list(single.x) == [point["step"] for point in relearned["erased"]["s1"]["curve"]]
    assert single.y == pytest.approx([100 * p["prefix"] / relearned["erased"]["s1"]["limit"] for p in
                                      relearned["erased"]["s1"]["curve"]])  # fmt: skip
    assert len(figure.data) == 4 + 6


def test_what_is_learned_counts_on(changed):
    lesson = {
        "relearned": {"new": {"c": curve(4, 0, 1, 1, 4)}, "erased": {"b": curve(2, 1, 2), "a": curve(4, 0, 2, 2, 2)}},
        "resurfacing": {},
    }
    erased, new, limit, *single = relearning_figure(changed(relearning={"itself": lesson})).data
    assert (erased.name, erased.x, erased.y) == ("erased, 2 texts", (0, 1, 2, 3), (25, 75, 75, 75))
    assert (new.name, new.x, new.y) == ("new, 1 text", (0, 1, 2, 3), (0, 25, 25, 100))
    assert (limit.x, limit.y, limit.line.dash) == ((0, 3), (100, 100), "dash")
    assert [line.name for line in single] == ["erased: a", "erased: b", "new: c"]
    assert (single[1].x, single[1].y) == ((0, 1), (50, 100))
    looks = {(line.line.color, line.line.dash) for line in (erased, new, limit)}
    assert len(looks) == 3
    assert (single[0].line.color, single[2].line.color) == (erased.line.color, new.line.color)


def test_curves_with_fewer_looks(changed):
    """A kind that is learned soon goes on to the last step of the others."""
    relearned = {"erased": {"a": curve(2, 0, 2)}, "new": {"c": curve(2, 0, 1, 2, every=3)}}
    erased, new, *_ = relearning_figure(
        changed(relearning={"half": {"relearned": relearned, "resurfacing": {}}}), "half"
    ).data
    assert (erased.x, erased.y) == ((0, 1, 6), (0, 100, 100))
    assert (new.x, new.y) == ((0, 3, 6), (0, 50, 100))


def test_ids_are_shown_as_they_are_written(audited, tmp_path):
    figure = relearning_figure(audited)
    safe = "&lt;/script&gt;&lt;script&gt;window.broken = 1&lt;/script&gt;\\u202e|`&#36;x_1&#36;`"
    assert f"erased: {safe}" in [trace.name for trace in figure.data]
    assert HOSTILE_ID[:17] not in figure.to_json()
    save_figure(figure, tmp_path / "a.svg")
    written = (tmp_path / "a.svg").read_text()
    assert "limit: half of the suffix" in written
    assert "opacity: 0.35" in written


def test_means_lie_above_single_texts(audited):
    figure = relearning_figure(audited)
    (axes,) = drawn(figure, 3.3).axes
    places = {trace.name: line.get_zorder() for trace, line in zip(figure.data, axes.lines, strict=True)}
    means = {name for name in places if name.endswith("2 texts")}
    assert len(means) == 3
    assert min(places[name] for name in means) > max(place for name, place in places.items() if name not in means)


def test_what_is_refused(audited, changed, tmp_path):
    with pytest.raises(ValueError, match="has no lesson 'other'; it has itself, half"):
        relearning_figure(audited, "other")
    with pytest.raises(ValueError, match=r"holds no audit of an erasure .*make one: memloc audit ORIGINAL"):
        relearning_figure(tmp_path)
    folder = changed()
    found = json.loads((folder / "audit.json").read_text())
    del found["relearning"], found["targets"]
    (folder / "audit.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"audit\.json has no relearning, targets; make it again: memloc audit"):
        relearning_figure(folder)
