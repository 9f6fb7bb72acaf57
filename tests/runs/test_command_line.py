import errno
import json
import os
import re
import runpy
import signal
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest

from memloc_lens import LOCALIZERS, Activations, HardConcrete, Slimming
from memloc_lens.benchmarks import deletion, injection
from memloc_lens.benchmarks.deletion import DeletionSettings
from memloc_lens.benchmarks.injection import InjectionSettings
from memloc_lens.localizers import FURTHER
from memloc_lens.runs import settings as settings_module
from memloc_lens.runs.command_line import parse, published, run_command
from memloc_lens.runs.methods import name_of
from memloc_lens.runs.parallel import Parallel

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
OWN = '''
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch


@dataclass(frozen=True)
class Mine:
    """A method of the user's own.

    Args:
        strength: How strong it is.
    """

    strength: float = 1.0
    where: Path = Path("here")
    bold: bool = False

    def __call__(self, model, sequences):
        draw = torch.Generator().manual_seed(round(self.strength))
        return torch.rand(len(sequences), model.cfg.n_layers, model.cfg.d_mlp, generator=draw)


@dataclass(frozen=True)
class Limit(Mine):
    name: ClassVar[str] = "limit"


@dataclass(frozen=True)
class Seed(Mine):
    name: ClassVar[str] = "seed"


@dataclass(frozen=True)
class Keyword(Mine):
    name: ClassVar[str] = "class"


def plain(model, sequences):
    return Mine()(model, sequences)


def flat(model, sequences):
    return Mine()(model, sequences)[0]


def lost(model, sequences):
    return Mine()(model, sequences).log() * 0 / 0
'''


def read(*arguments: str) -> DeletionSettings:
    return parse(DeletionSettings, "command", None, list(arguments))


def method_of(settings: DeletionSettings, name: str):
    return next(localizer for localizer in settings.localizers() if name_of(localizer) == name)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a benchmark's `main` with arguments; return the exit status and what it said."""

    def call(main, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        try:
            main()
        except SystemExit as end:
            said = f"{end.code}\n" if isinstance(end.code, str) else ""
            return 1 if said else end.code, said + capsys.readouterr().err
        return 0, capsys.readouterr().out

    return call


@pytest.fixture
def small_arguments(recited, tmp_path) -> list[str]:
    """Of the quickest run there is."""
    return (
        f"--model {recited / 'model'} --data {recited / 'data.jsonl'} --limit 2 --negatives 2 --controls 1 "
        f"--ratios 0.5 --device cpu --out {tmp_path / 'run'}"
    ).split()


def test_a_configuration_comes_before_the_command_line(tmp_path):
    (tmp_path / "paper.toml").write_text(CONFIG)
    settings = read("--config", str(tmp_path / "paper.toml"), "--hard-concrete.steps", "5")
    assert (settings.model, settings.ratios, settings.first_layer) == ("gpt2-xl", (0.001, 0.005), 2)
    assert method_of(settings, "hard-concrete") == HardConcrete(lr=1e-3, steps=5, first_layer=2)
    assert [name_of(localizer) for localizer in settings.methods] == list(LOCALIZERS)
    assert published(settings.config) == {"hard-concrete": {"0.001": {"self_acc": -34.6}}}
    assert published(None) == {}


def test_methods_and_their_options():
    settings = read(
        "--methods", "activations", "slimming", "--slimming.lr", "0.5", "--activations.reduction", "mean_abs"
    )
    assert settings.methods == (Activations("mean_abs"), Slimming(lr=0.5))
    of_heads = read("--component", "head")
    assert {"zero-out", "slimming"} < {name_of(localizer) for localizer in of_heads.methods}
    assert "integrated-gradients" not in {name_of(localizer) for localizer in of_heads.methods}
    assert all(localizer.component == "head" for localizer in of_heads.localizers())


def test_presets_of_a_benchmark_are_its_defaults():
    tuned = InjectionSettings.presets["neuron"]["slimming"]
    assert tuned.lr != Slimming().lr
    assert tuned in InjectionSettings().localizers()
    assert method_of(InjectionSettings(component="weight"), "slimming") == Slimming(component="weight")
    for arguments, expected in (([], tuned), (["--component", "weight"], Slimming(component="weight"))):
        settings = parse(InjectionSettings, "command", None, [*arguments, "--slimming.steps", "7"])
        assert method_of(settings, "slimming") == replace(expected, steps=7)


@pytest.mark.parametrize(
    ("content", "message"),
    [("limit = ", "is not TOML"), (None, "cannot be read"), (b"\xff", "is not TOML")],
)
def test_a_bad_configuration_is_one_error(tmp_path, content, message):
    path = tmp_path / "bad.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read("--config", str(path))


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("published = 3", "published"),
        ("[published]\nrandom = 3", "published.random"),
        ('[published.random]\n"0.1" = 3', "published.random.0.1"),
        ('[published.random."0.1"]\nself_acc = "low"', "published.random.0.1"),
        ('[published.random."0.1"]\nself_acc = true', "published.random.0.1"),
        ('[published.random."0.1"]\nself_acc = nan', "published.random.0.1"),
        ('[published.random."0.1"]\nself_acc = 2026-01-01', "published.random.0.1"),
        ('[published.random."0.1"]\nself_acc = [1]', "published.random.0.1"),
        ("published = [3]", "published"),
        ("[published.random]\nself_acc = -3", "published.random.self_acc"),
    ],
)
def test_published_figures_are_numbers(tmp_path, small_del, content, place):
    (tmp_path / "bad.toml").write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"[{place}] does not hold numbers")):
        published(tmp_path / "bad.toml")
    with pytest.raises(ValueError, match="does not hold numbers"):  # before the run rather than after it
        deletion.run(replace(small_del, config=tmp_path / "bad.toml", out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_published_ratios_are_numbers_in_any_form(tmp_path):
    (tmp_path / "some.toml").write_text('[published.random."0.10"]\nself_acc = -3')
    assert published(tmp_path / "some.toml") == {"random": {"0.1": {"self_acc": -3}}}
    (tmp_path / "bad.toml").write_text("[published.random.some]\nself_acc = -3")
    with pytest.raises(ValueError, match=r"\[published\.random\.some\] has 'some' in place of a ratio"):
        published(tmp_path / "bad.toml")


def test_an_unknown_setting_is_named(tmp_path, capsys):
    (tmp_path / "bad.toml").write_text("lenght = 3")
    with pytest.raises(SystemExit):
        read("--config", str(tmp_path / "bad.toml"))
    assert "lenght" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(PAPER.glob("*.toml")), ids=lambda path: path.stem)
def test_configurations_of_the_paper(path):
    kind = InjectionSettings if path.stem.startswith("inj") else DeletionSettings
    settings = parse(kind, "command", None, ["--config", str(path)])
    assert settings.limit == 0
    assert method_of(settings, "hard-concrete").penalty >= 100
    for cells in published(settings.config).values():
        assert {float(ratio) for ratio in cells} <= set(settings.ratios)
    assert "--config benchmarks/paper/" + path.name in path.read_text()


def test_the_paper_has_eleven_runs():
    assert len(list(PAPER.glob("*.toml"))) == 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--hard-concrete.lr nan", "lr is nan; it must be a number above 0"),
        ("--methods random --hard-concrete.lr nan", "lr is nan; it must be a number above 0"),
        ("--device banana", "device is 'banana'; it must be one of cpu, cuda"),
        ("--device cuda", "device is 'cuda', but there is no CUDA device here"),
        ("--ratios nan", "the ratio is nan; it must be a number above 0 and at most 1"),
        ("--ratios 0.1 0.1", "name each once"),
        ("--limit -1", "limit is -1; it must be a whole number at least 0"),
        ("--memory lots", "memory is 'lots'; write an amount"),
        ("--methods guess", "no method is called 'guess'; there are hard-concrete"),
        ("--methods random random", "methods are random random; name each once"),
        ("--component head --methods random integrated-gradients", "scores neurons only, not heads|INJ writes"),
        ("--component weight --methods zero-out", "zero one by one|no exact form for every weight"),
        ("--component wing", "invalid choice 'wing'"),
        ("--config /nowhere.toml", "the configuration /nowhere.toml cannot be read"),
        ("--nonsense 3", "--nonsense"),
    ],
)
@pytest.mark.parametrize("main", [deletion.main, injection.main], ids=["del", "inj"])
def test_bad_settings_end_before_a_model_is_loaded(command, monkeypatch, tmp_path, main, arguments, message):
    monkeypatch.setattr(settings_module, "load_model", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, said = command(main, *arguments.split(), "--out", str(tmp_path / "run"))
    assert status != 0
    assert re.search(message, re.sub(r"\s+", " ", said))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["del", "inj", "agreement", "specificity", "frontier"])
def test_every_command_is_a_module(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, f"memloc_lens.benchmarks.{name}", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"memloc_lens.benchmarks.{name}", run_name="__main__")
    assert end.value.code == 0
    assert f"usage: python -m memloc_lens.benchmarks.{name}" in " ".join(capsys.readouterr().out.split())


def test_interrupts_tell_how_to_go_on():
    def interrupted(settings):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="stopped; what was recorded is kept: repeat the command to resume"):
        run_command(lambda arguments: None, interrupted, print, [])


@pytest.mark.parametrize("raises_its_own", [False, True])
def test_sigterm_ends_a_run_as_an_interrupt_does(capsys, raises_its_own):
    """Also in a library that raises an interrupt of its own for ours, as ray does."""
    before = signal.getsignal(signal.SIGTERM)

    def terminated(settings):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(9)
        except KeyboardInterrupt:
            if raises_its_own:
                raise KeyboardInterrupt from None
            raise

    with pytest.raises(SystemExit) as end:
        run_command(lambda arguments: None, terminated, print, [])
    assert end.value.code == 143
    assert "stopped; what was recorded is kept: repeat the command to resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_command_runs_in_a_thread_too(capsys):
    thread = threading.Thread(target=run_command, args=(" ".join, str.upper, lambda *shown: print(shown[1]), ["word"]))
    thread.start()
    thread.join()
    assert capsys.readouterr().out == "WORD\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("bad \x1b[31m id\nand more"), r"error: bad \x1b[31m id\nand more"),
        (OSError(errno.ENOSPC, "No space left on device", "scores/a"), "error: scores/a: No space left on device"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/x']"), "error: No usable temp"),
        (PermissionError(errno.EROFS, "Read-only file system"), "error: Read-only file system"),
    ],
)
def test_errors_are_one_line(error, line):
    def torn(settings):
        raise error

    with pytest.raises(SystemExit, match="^" + re.escape(line)) as end:
        run_command(lambda arguments: None, torn, print, [])
    assert str(end.value).isprintable()


def test_results_are_shown_and_arguments_are_those_given(capsys):
    run_command(" ".join, str.upper, lambda settings, result: print(settings, result), ["some", "words"])
    assert capsys.readouterr().out == "some words SOME WORDS\n"


def test_own_methods_bring_their_options(module, capsys):
    module("mymod", OWN)
    settings = read(*"--methods random mymod:Mine mymod:plain --mine.strength 3 --mine.where x --mine.bold".split())
    random, mine, plain = settings.methods
    assert random == LOCALIZERS["random"]()
    assert (mine.strength, mine.where, mine.bold) == (3, Path("x"), True)
    assert plain.__name__ == "plain"
    with pytest.raises(SystemExit):
        read("--methods", "mymod:Mine", "--help")
    shown = capsys.readouterr().out
    assert "--mine.strength" in shown
    assert "How strong it is." in shown


def test_own_methods_in_a_configuration_file(module, tmp_path):
    module("mymod", OWN)
    (tmp_path / "own.toml").write_text('methods = ["mymod:Mine", "random"]\n[mine]\nstrength = 3\nbold = true\n')
    mine, _ = read("--config", "own.toml").methods
    assert (mine.strength, mine.bold) == (3, True)
    mine, _ = read("--config", "own.toml", "--mine.strength", "4", "--mine.no-bold").methods
    assert (mine.strength, mine.bold) == (4, False)


@pytest.mark.parametrize(("name", "others"), [("limit", {"limit": 7}), ("seed", {"seed": 7}), ("class", {})])
def test_a_name_like_a_setting_or_a_keyword_keeps_its_own_options(module, name, others):
    module("mymod", OWN)
    kind = {"limit": "Limit", "seed": "Seed", "class": "Keyword"}[name]
    of_settings = [word for setting, value in others.items() for word in (f"--{setting}", str(value))]
    settings = read("--methods", f"mymod:{kind}", f"--{name}.strength", "3", *of_settings)
    (mine,) = settings.methods
    assert (name_of(mine), mine.strength) == (name, 3)
    assert all(getattr(settings, setting) == value for setting, value in others.items())


def test_two_own_methods_of_one_name_are_refused(module):
    module("mymod", OWN)
    module("other", OWN)
    with pytest.raises(ValueError, match="methods are mine mine; name each once"):
        read("--methods", "mymod:Mine", "other:Mine", "--mine.strength", "3")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("mymod:flat", r"flat returned \[3, 128\] for 2 sequences; \[2, 3, 128\] \[sequence, layer, neuron\]"),
        ("mymod:lost", "lost returned 768 NaN scores, the first for s0"),
        ("mymod:absent", "method 'mymod:absent' cannot be used: AttributeError"),
        ("torn:Mine", "method 'torn:Mine' cannot be used: RuntimeError: torn"),
    ],
)
def test_bad_methods_are_one_line(module, command, small_arguments, method, message):
    module("mymod", OWN)
    module("torn", "raise RuntimeError('torn')")
    status, said = command(deletion.main, *small_arguments, "--methods", method)
    assert status == 1
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert re.search(message, line)


def test_a_changed_own_setting_is_noticed(module, command, small_arguments, tmp_path):
    module("mymod", OWN)
    arguments = [*small_arguments, "--methods", "random", "mymod:Mine"]
    assert command(deletion.main, *arguments, "--mine.strength", "3")[0] == 0
    records = (tmp_path / "run" / "records.jsonl").read_bytes()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["methods"]["mine"] == {
        "callable": "mymod:Mine",
        "strength": 3.0,
        "where": "here",
        "bold": False,
    }
    for change, message in (
        (("--mine.strength", "4"), "mine.strength is 3.0 there and 4.0 here"),
        (("--mine.strength", "3", "--seed", "1"), "seed is 0 there and 1 here"),
    ):
        status, said = command(deletion.main, *arguments, *change)
        assert status == 1
        assert re.search(f"^error: .*{message}.*--out", said)
    assert command(deletion.main, *arguments, "--mine.strength", "3")[0] == 0
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == records


@pytest.mark.parametrize(
    ("kind", "explained"),
    [
        (DeletionSettings, "the paper leaves out layer 0"),
        (InjectionSettings, "The injection ends, and has succeeded, when the loss of the text is under this value"),
    ],
)
def test_help_explains_every_setting(capsys, kind, explained):
    with pytest.raises(SystemExit):
        parse(kind, "command", "What it is about.", ["--help"])
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)  # lines break where the terminal ends
    assert "What it is about." in shown
    assert explained in shown
    assert "Training ends when the mean absolute mask falls under this value" in shown
    assert f"Methods to compare: {', '.join(LOCALIZERS | FURTHER)}; with protect- or contrast-" in shown
    for entry in (*fields(kind), *fields(Parallel)):
        assert "--" + entry.name.replace("_", "-") in shown or entry.name == "parallel"
    for name, localizer in LOCALIZERS.items():
        for entry in fields(localizer):
            if entry.name == "context":  # filled by the run
                continue
            assert f"--{name}.{entry.name.replace('_', '-')}" in shown
