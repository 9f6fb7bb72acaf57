import itertools
import json
from dataclasses import replace

import engines
import numpy as np
import pytest

from conftest import records_of, write_lines
from memloc_lens.benchmarks import agreement
from memloc_lens.benchmarks.agreement import BASELINES, LEVEL, AgreementSettings, compare, print_agreement, show
from memloc_lens.runs import settings as settings_module

METHODS = ("a", "b", "c", "d")
SEQUENCES = {"del": 6, "inj": 7}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Fewer than a user gets, and still more than there are sign flips, so that p-values are exact."""
    monkeypatch.setattr(agreement, "RESAMPLES", 400)


def write_run(folder, benchmark: str, metric: str, ratio: float, values: dict[str, list[float]]):
    folder.mkdir()
    records = [
        {"sequence": f"s{index}", "method": method, "ratio": ratio, metric: value}
        for method, row in values.items()
        for index, value in enumerate(row)
    ]
    state = {"sequence": "s0", "method": "before" if benchmark == "del" else "injection", "ratio": 0.0, "loss": 0.1}
    write_lines(folder / "records.jsonl", [state, *records])
    summary = {"benchmark": benchmark, "methods": {name: {str(ratio): {}} for name in values}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def runs(tmp_path):
    draw = np.random.default_rng(0)
    levels = {"a": 50, "b": 30, "c": 30.5, "d": 5, "random": 0}
    lost = {method: [-level + draw.normal() for _ in range(SEQUENCES["del"])] for method, level in levels.items()}
    found = {method: [level / 2 + draw.normal() for _ in range(SEQUENCES["inj"])] for method, level in levels.items()}
    return (
        write_run(tmp_path / "del", "del", "self_acc", 0.1, lost),
        write_run(tmp_path / "inj", "inj", "recall@0.01", 0.01, found),
        lost,
        found,
    )


def tau(one: list[float], other: list[float]) -> float:
    """Kendall (1938), without ties: concordant minus discordant pairs, over all."""
    signs = [np.sign((one[i] - one[j]) * (other[i] - other[j])) for i, j in itertools.combinations(range(len(one)), 2)]
    return float(np.mean(signs))


def test_means_ranks_and_correlation(runs):
    run_del, run_inj, lost, found = runs
    result = compare(AgreementSettings(run_del, run_inj))
    assert set(result["methods"]) == set(METHODS)
    assert result["headings"] == ["DEL: Self-Acc lost at 10%", "INJ: Recall@1%"]
    assert result["sequences"] == list(SEQUENCES.values())
    for method in METHODS:
        deletion, injection = result["methods"][method]
        assert deletion["mean"] == pytest.approx(-np.mean(lost[method]))
        assert injection["mean"] == pytest.approx(np.mean(found[method]))
    means = [[np.mean(values[method]) * sign for method in METHODS] for values, sign in ((lost, -1), (found, 1))]
    assert result["kendall"]["mean"] == pytest.approx(tau(*means))
    order = [sorted(range(len(METHODS)), key=lambda index: -row[index]) for row in means]
    assert [METHODS[index] for index in order[0]] == list(result["methods"])
    ranks = [[row.index(index) for index in range(len(METHODS))] for row in order]
    for index, method in enumerate(METHODS):
        assert [cell["rank"] for cell in result["methods"][method]] == [row[index] + 1 for row in ranks]
    squares, count = sum((one - other) ** 2 for one, other in zip(*ranks, strict=True)), len(METHODS)
    assert result["spearman"]["mean"] == pytest.approx(1 - 6 * squares / (count * (count**2 - 1)))
    for name in ("kendall", "spearman"):
        assert result[name]["low"] <= result[name]["mean"] <= result[name]["high"] <= 1


def test_p_values_are_those_of_all_sign_flips(runs):
    run_del, run_inj, lost, _ = runs
    result = compare(AgreementSettings(run_del, run_inj))
    names = list(result["methods"])
    tests = 2 * (len(names) - 1)  # of both benchmarks
    for better, worse in itertools.pairwise(names):
        differences = np.array(lost[worse]) - np.array(lost[better])
        flips = [np.mean(differences * signs) for signs in itertools.product((1, -1), repeat=SEQUENCES["del"])]
        p = np.mean([flipped >= differences.mean() - 1e-12 for flipped in flips])
        assert result["methods"][better][0]["p"] == pytest.approx(min(1, p * tests))
    assert result["methods"][names[-1]][0]["p"] is None


def test_baselines_on_demand_and_the_same_with_the_same_seed(runs):
    run_del, run_inj, *_ = runs
    with_baselines = compare(AgreementSettings(run_del, run_inj, baselines=True))
    assert set(with_baselines["methods"]) == {*METHODS, "random"}
    assert with_baselines == compare(AgreementSettings(run_del, run_inj, baselines=True))


def test_the_table_and_the_file(runs, tmp_path, capsys):
    run_del, run_inj, *_ = runs
    settings = AgreementSettings(run_del, run_inj, out=tmp_path / "agreement.json")
    result = compare(settings)
    show(settings, result)
    shown = capsys.readouterr().out
    assert f"Kendall's tau-b {result['kendall']['mean']:+.2f}" in shown
    assert all(method in shown for method in METHODS)
    assert json.loads((tmp_path / "agreement.json").read_text()) == result
    sure = [cell["p"] is not None and cell["p"] < LEVEL for cells in result["methods"].values() for cell in cells]
    assert shown.count("*") - 1 == sum(sure)  # and one that says what it means
    print_agreement(result)
    assert capsys.readouterr().out == shown


def test_runs_of_the_benchmarks_themselves(whole_del, whole_inj):
    settings = AgreementSettings(whole_del.out, whole_inj.out)
    result = compare(settings)
    wanted = {record["method"] for record in records_of(whole_inj.out)} - {"injection", *BASELINES}
    assert set(result["methods"]) == wanted
    assert result["headings"] == ["DEL: Self-Acc lost at 50%", "INJ: Recall@20%"]
    summaries = [json.loads((run.out / "summary.json").read_text()) for run in (whole_del, whole_inj)]
    for method, cells in result["methods"].items():
        assert cells[0]["mean"] == pytest.approx(-summaries[0]["methods"][method]["0.5"]["self_acc"]["mean"])
        assert cells[1]["mean"] == pytest.approx(summaries[1]["methods"][method]["0.2"]["recall@0.2"]["mean"])
    at_other = compare(replace(settings, del_ratio=0.1))
    assert at_other["headings"][0] == "DEL: Self-Acc lost at 10%"


def test_an_engine_does_the_work(runs):
    run_del, run_inj, *_ = runs
    settings = AgreementSettings(run_del, run_inj)
    assert compare(settings, engines.twice) == compare(settings)


def test_what_cannot_be_compared(runs, tmp_path):
    run_del, run_inj, *_ = runs
    with pytest.raises(ValueError, match="is a run of inj; give one of del"):
        compare(AgreementSettings(run_inj, run_del))
    with pytest.raises(ValueError, match="is a run of del; give one of inj"):
        compare(AgreementSettings(run_del, run_del))
    with pytest.raises(ValueError, match=r"no records at the ratio 0\.5; it has 0\.1"):
        compare(AgreementSettings(run_del, run_inj, del_ratio=0.5))
    with pytest.raises(ValueError, match="holds no finished run"):
        compare(AgreementSettings(tmp_path / "nothing", run_inj))
    two = {"a": [1.0, 2.0], "b": [1.0, 3.0]}
    few = write_run(tmp_path / "few", "inj", "recall@0.01", 0.01, two)
    with pytest.raises(ValueError, match="share the methods a, b; a comparison needs 3"):
        compare(AgreementSettings(run_del, few))
    with pytest.raises(ValueError, match="seed is -1"):
        AgreementSettings(run_del, run_inj, seed=-1)


def test_the_command(runs, tmp_path, monkeypatch, capsys):
    run_del, run_inj, *_ = runs
    monkeypatch.setattr(settings_module, "load_model", None)
    out = tmp_path / "result.json"
    monkeypatch.setattr("sys.argv", ["agreement", str(run_del), str(run_inj), "--baselines", "--out", str(out)])
    agreement.main()
    assert "random" in capsys.readouterr().out
    assert json.loads(out.read_text()) == compare(AgreementSettings(run_del, run_inj, baselines=True))
    monkeypatch.setattr("sys.argv", ["agreement", str(run_inj), str(run_inj)])
    with pytest.raises(SystemExit, match=r"error: .* is a run of inj; give one of del"):
        agreement.main()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "x"])
def test_what_is_no_number_is_refused_by_line(runs, value):
    run_del, run_inj, *_ = runs
    records = [json.loads(line) for line in (run_inj / "records.jsonl").read_text().splitlines()]
    records[3]["recall@0.01"] = value
    write_lines(run_inj / "records.jsonl", records)
    with pytest.raises(ValueError, match=r"records\.jsonl, line 4: recall@0\.01 is .*, where a finite number belongs"):
        compare(AgreementSettings(run_del, run_inj))


def test_a_missing_metric_is_named(runs):
    run_del, run_inj, *_ = runs
    records = [json.loads(line) for line in (run_del / "records.jsonl").read_text().splitlines()]
    del records[1]["self_acc"]
    write_lines(run_del / "records.jsonl", records)
    with pytest.raises(ValueError, match=r"del has no self_acc of a for s0"):
        compare(AgreementSettings(run_del, run_inj))
