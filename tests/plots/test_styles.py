import itertools
import string

from memloc_lens import LOCALIZERS
from memloc_lens.localizers import FURTHER
from memloc_lens.plots.style import LETTERS, PLACES, error_bars, heat_map, labels, shortened, style_of


def test_methods_of_the_package_look_different():
    assert len({style_of(name) for name in PLACES}) == len(PLACES)
    assert {*LOCALIZERS, *FURTHER, "protect-slimming"} <= set(PLACES)
    defaults = [style_of(name) for name in LOCALIZERS]
    assert len({style.colour for style in defaults}) == len(defaults)
    markers = [(style.symbol, style.dash) for style in map(style_of, (*LOCALIZERS, *FURTHER))]
    most = max(map(markers.count, markers))
    assert most == 2  # the ninth method has the marker of the first, and another colour


def test_another_method_looks_as_no_method_of_the_package():
    known = {style_of(name)[:2] for name in PLACES}
    names = ["".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=2)]
    looks = {style_of(name)[:2] for name in names}
    assert not looks & known
    assert len(looks) > 30


def luminance(colour: str) -> float:
    """The relative luminance of the web's guidelines on contrast."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_lines_stand_out_on_light_and_dark_pages():
    dark = luminance("#1e2129")
    for name in LOCALIZERS:
        own = luminance(style_of(name).colour)
        assert 1.05 / (own + 0.05) > 2
        assert (own + 0.05) / (dark + 0.05) > 2


def test_labels_are_cut_and_thinned():
    assert shortened("a" * LETTERS) == "a" * LETTERS
    assert shortened("&lt;" * (LETTERS + 1)) == "&lt;" * (LETTERS - 1) + "…"
    axis = labels([f"s{index}" for index in range(100)])
    assert axis["tickvals"] == axis["ticktext"] == [f"s{index}" for index in range(0, 100, 5)]


def test_cells_of_large_heat_maps_touch():
    assert heat_map([[1.0] * 20] * 20, "points").xgap == 1
    assert heat_map([[1.0] * 200] * 20, "points").xgap == 0


def test_an_interval_beside_its_mean_has_no_bar_on_that_side():
    bars = error_bars([{"mean": 1.0, "low": 1.5, "high": 4.0, "n": 3}], "red")
    assert (bars["arrayminus"], bars["array"]) == ([0], [3.0])
