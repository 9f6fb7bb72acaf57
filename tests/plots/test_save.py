"""Files of figures: what is in them, against the figures themselves."""

import io
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import numpy as np
import plotly.graph_objects as go
import pytest
from matplotlib.colors import to_rgba
from matplotlib.image import imread

from memloc_lens.plots import overlap_figure, recall_figure, save_figure
from memloc_lens.plots.drawing import drawn
from memloc_lens.plots.style import escaped


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def two_lines() -> go.Figure:
    error = dict(type="data", symmetric=False, array=[1, 2, 3], arrayminus=[0.5, 0.25, 0.125])
    lines = [
        go.Scatter(x=[1, 10, 100], y=[5, 6, 7], error_y=error, name="one", line=dict(color="#009E73", dash="dot")),
        go.Scatter(x=[1, 10], y=[2, 3], name="_two", mode="markers", marker=dict(color="red", symbol="square-open")),
    ]
    return go.Figure(lines, dict(title="A title", xaxis=dict(title="seconds", type="log"), yaxis=dict(title="points")))


def texts(file: str) -> list[str]:
    root = ElementTree.parse(file).getroot()
    return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize(("columns", "inches"), [(1, 3.3), (2, 6.9)])
def test_widths(two_lines, columns, inches):
    for name in ("a.png", "a.svg", "a.PDF"):
        save_figure(two_lines, name, columns)
    assert imread("a.png").shape[1] == pytest.approx(300 * inches, abs=1)
    assert float(ElementTree.parse("a.svg").getroot().get("width").removesuffix("pt")) == pytest.approx(72 * inches)
    box = re.search(rb"/MediaBox \[ *0 0 ([\d.]+)", Path("a.PDF").read_bytes())
    assert float(box[1]) == pytest.approx(72 * inches)


def test_text_is_text(two_lines):
    save_figure(two_lines, "a.svg")
    assert {"A title", "seconds", "points", "one", "_two", "1", "10", "100"} <= set(texts("a.svg"))
    save_figure(two_lines, "a.pdf")
    assert b"/FontFile2" in Path("a.pdf").read_bytes()  # TrueType, not outlines


@pytest.mark.parametrize("text", ["<b>$a_1$ %{x}\x1b[31m", "$x^2$", "_a", "$", "a\\b", "&lt;"])
def test_names_are_written_as_they_are(text):
    """Neither HTML nor mathtext: a formula that cannot be parsed would end in an error."""
    shown = text.replace("\x1b", "\\x1b")
    lines = [go.Scatter(x=[1], y=[2], name=escaped(text)), go.Scatter(x=[1], y=[2], name="other")]
    axis = dict(tickvals=[1], ticktext=[escaped(text)], title=escaped(text))
    save_figure(go.Figure(lines, dict(xaxis=axis)), "a.svg")
    assert texts("a.svg").count(shown) == 3


def test_lines_markers_and_bars(two_lines):
    (axes,) = drawn(two_lines, 3.3).axes
    one, two = (container.lines[0] for container in axes.containers)
    assert one.get_xydata().tolist() == [[1, 5], [10, 6], [100, 7]]
    assert two.get_xydata().tolist() == [[1, 2], [10, 3]]
    assert (one.get_linestyle(), one.get_color(), one.get_marker()) == (":", "#009E73", "o")
    assert (two.get_linestyle(), two.get_marker(), two.get_markerfacecolor()) == ("None", "s", "none")
    ((bars,),) = [container.lines[2] for container in axes.containers if container.has_yerr]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [[4.5, 6], [5.75, 8], [6.875, 10]]
    assert axes.get_xscale() == "log"
    assert axes.get_yscale() == "linear"


def test_heat_map():
    nothing = None
    figure = go.Figure(
        go.Heatmap(z=[[0, 1], [nothing, 0.5]], x=["a", "b"], y=["c", "d"], colorscale=[[0, "#000000"], [1, "#ffffff"]],
                   text=[["0", "1"], ["", "half"]], colorbar=dict(title="share")),
        dict(yaxis=dict(autorange="reversed")),
    )  # fmt: skip
    drawing = drawn(figure, 3.3)
    axes, bar = drawing.axes
    drawing.savefig(io.BytesIO())
    (mesh,) = axes.collections
    colours = mesh.get_facecolors()
    for place, wanted in ((0, "black"), (1, "white")):
        assert np.allclose(colours[place], to_rgba(wanted), atol=0.01)
    assert colours[2][3] == 0  # empty
    assert np.allclose(colours[3][:3], 0.5, atol=0.01)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    assert [(text.get_text(), text.get_position()) for text in axes.texts] == [
        ("0", (0, 0)), ("1", (1, 0)), ("", (0, 1)), ("half", (1, 1))
    ]  # fmt: skip
    assert [text.get_color() for text in axes.texts][:2] == ["white", "black"]
    assert axes.yaxis_inverted()
    assert bar.get_ylabel() == "share"


def test_bars_stand_side_by_side():
    bars = [go.Bar(x=["a", "b"], y=[1, 2], name="one"), go.Bar(x=["a", "b"], y=[3, 4], name="two")]
    (axes,) = drawn(go.Figure(bars), 3.3).axes
    boxes = [
        [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in each] for each in axes.containers
    ]
    assert [[height for *_, height in each] for each in boxes] == [[1, 2], [3, 4]]
    for place in (0, 1):
        (left, middle, _), (start, right, _) = boxes[0][place], boxes[1][place]
        assert middle == pytest.approx(start)
        assert (left + right) / 2 == pytest.approx(place)


def test_a_range_and_steps_of_an_axis():
    axis = dict(range=[0, 2], type="log")
    (axes,) = drawn(go.Figure(go.Scatter(y=[1, 2, 3], x0=5), dict(xaxis=axis, yaxis=dict(dtick=0.5))), 3.3).axes
    assert axes.get_xlim() == (1, 100)
    assert axes.lines[0].get_xdata().tolist() == [5, 6, 7]
    assert set(np.diff(axes.get_yticks())) == {0.5}


@pytest.mark.parametrize(("values", "wanted"), [
    ([0.3, 3], {"0.5", "1", "2"}),
    ([0.002, 0.9], {"0.01", "0.1"}),
    ([3, 40_000], {"10", "100", "1000", "10000"}),
])  # fmt: skip
def test_numbers_along_a_log_axis(values, wanted):
    save_figure(
        go.Figure(go.Scatter(x=values, y=[1, 1]), dict(xaxis=dict(type="log"), yaxis=dict(tickvals=[]))), "a.svg"
    )
    shown = {text for text in texts("a.svg") if min(values) <= float(text) <= max(values)}
    assert shown == wanted


def test_nothing_else_of_matplotlib_changes(two_lines):
    save_figure(two_lines, "before.svg")
    with matplotlib.rc_context():
        matplotlib.rcParams.update({"text.color": "white", "savefig.bbox": "tight", "font.size": 30})
        before = dict(matplotlib.rcParams)
        save_figure(two_lines, "after.svg")
        with pytest.raises(ValueError, match="kind 'pie'"):
            save_figure(go.Figure(go.Pie(values=[1, 2])), "a.svg")
        assert dict(matplotlib.rcParams) == before
    assert Path("after.svg").read_text() == Path("before.svg").read_text()


def test_the_same_figure_makes_the_same_file(two_lines):
    for suffix in ("svg", "pdf", "png"):
        for name in ("one", "two"):
            save_figure(two_lines, f"{name}.{suffix}")
        assert Path(f"one.{suffix}").read_bytes() == Path(f"two.{suffix}").read_bytes()


def test_figures_of_runs(whole_del, whole_inj):
    save_figure(recall_figure(whole_inj.out), "recall.svg")
    assert {"ceiling", "random", "recall (points)", "1", "10", "100"} <= set(texts("recall.svg"))
    save_figure(overlap_figure(whole_del.out), "overlap.svg", 2)
    assert {"overlap (%)", "iterative-gradient", "100"} <= set(texts("overlap.svg"))


@pytest.mark.parametrize(("figure", "message"), [
    (go.Figure(go.Pie(values=[1])), "kind 'pie' cannot be drawn; scatter, bar, heatmap can"),
    (go.Figure(go.Scatter(y=[1], xaxis="x2", name="other")), "the trace 'other' is in axes of its own"),
    (go.Figure(go.Scatter(y=[1], mode="markers+text")), "writes text; lines and markers can be drawn"),
    (go.Figure(layout=dict(shapes=[dict(type="line")])), "the layout has shapes, which cannot be drawn"),
    (go.Figure(layout=dict(annotations=[dict(text="a")])), "the layout has annotations"),
])  # fmt: skip
def test_what_cannot_be_drawn(figure, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_figure(figure, "a.png")
    assert not list(tmp_path.iterdir())
