from pathlib import Path

import pytest

from memloc_lens.benchmarks import insertion
from memloc_lens.benchmarks.deletion import Settings
from memloc_lens.benchmarks.runner import parse, published

PAPER = Path(__file__).parents[2] / "benchmarks" / "paper"
CONFIG = """
model = "gpt2-xl"
ratios = [0.001, 0.005]
first_layer = 2

[hard_concrete]
lr = 1e-3
steps = 700

[published.hard-concrete."0.001"]
self_acc = -34.6
"""


def test_a_configuration_comes_before_the_command_line(tmp_path):
    (tmp_path / "paper.toml").write_text(CONFIG)
    settings = parse(Settings, ["--config", str(tmp_path / "paper.toml"), "--hard-concrete.steps", "5"], "door")
    assert (settings.model, settings.ratios, settings.first_layer) == ("gpt2-xl", (0.001, 0.005), 2)
    assert (settings.hard_concrete.lr, settings.hard_concrete.steps) == (1e-3, 5)
    assert published(settings) == {"hard-concrete": {"0.001": {"self_acc": -34.6}}}
    assert published(Settings()) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [("limit = ", "is not TOML"), (None, "cannot be read")],
)
def test_a_bad_configuration_is_one_error(tmp_path, content, message):
    path = tmp_path / "bad.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse(Settings, ["--config", str(path)], "door")


def test_an_unknown_setting_is_named(tmp_path, capsys):
    (tmp_path / "bad.toml").write_text("lenght = 3")
    with pytest.raises(SystemExit):
        parse(Settings, ["--config", str(tmp_path / "bad.toml")], "door")
    assert "lenght" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(PAPER.glob("*.toml")), ids=lambda path: path.stem)
def test_configurations_of_the_paper(path):
    kind = insertion.Settings if path.stem.startswith("inj") else Settings
    settings = parse(kind, ["--config", str(path)], "door")
    assert settings.limit == 0
    assert settings.hard_concrete.penalty >= 100
    for cells in published(settings).values():
        assert {float(ratio) for ratio in cells} <= set(settings.ratios)
    assert "--config benchmarks/paper/" + path.name in path.read_text()


def test_the_paper_has_eleven_runs():
    assert len(list(PAPER.glob("*.toml"))) == 11
