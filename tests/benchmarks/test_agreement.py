import itertools
import json

import numpy as np
import pytest

from memloc_lens.benchmarks.agreement import Settings, compare, print_agreement

METHODS = ("a", "b", "c", "d")


def write_run(folder, benchmark: str, metric: str, ratio: float, values: dict[str, list[float]]):
    folder.mkdir()
    lines = [
        json.dumps({"sequence": f"s{place}", "method": method, "ratio": ratio, metric: value})
        for method, row in values.items()
        for place, value in enumerate(row)
    ]
    lines.append(json.dumps({"sequence": "s0", "method": "injection", "ratio": ratio, "loss": 0.1}))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "summary.json").write_text(json.dumps({"benchmark": benchmark, "methods": {name: {} for name in values}}))
    return folder


@pytest.fixture
def runs(tmp_path):
    draw = np.random.default_rng(0)
    levels = {"a": 50, "b": 30, "c": 30.5, "d": 5, "random": 0}
    lost = {method: [-level + float(draw.normal()) for _ in range(6)] for method, level in levels.items()}
    found = {method: [level / 2 + float(draw.normal()) for _ in range(7)] for method, level in levels.items()}
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
    result = compare(Settings(run_del, run_inj))
    assert set(result["methods"]) == set(METHODS)
    for method in METHODS:
        deletion, insertion = result["methods"][method]
        assert deletion["mean"] == pytest.approx(-np.mean(lost[method]))
        assert insertion["mean"] == pytest.approx(np.mean(found[method]))
    means = [[np.mean(values[method]) * sign for method in METHODS] for values, sign in ((lost, -1), (found, 1))]
    assert result["kendall"]["mean"] == pytest.approx(tau(*means))
    order = [sorted(range(4), key=lambda place: -row[place]) for row in means]
    assert [METHODS[place] for place in order[0]] == list(result["methods"])
    ranks = [[row.index(place) for place in range(4)] for row in order]
    squares = sum((one - other) ** 2 for one, other in zip(*ranks, strict=True))
    assert result["spearman"]["mean"] == pytest.approx(1 - 6 * squares / (4 * 15))
    for name in ("kendall", "spearman"):
        assert result[name]["low"] <= result[name]["mean"] <= result[name]["high"] <= 1


def test_p_values_are_those_of_all_sign_flips(runs):
    run_del, run_inj, lost, _ = runs
    result = compare(Settings(run_del, run_inj))
    names = list(result["methods"])
    for better, worse in itertools.pairwise(names):
        differences = np.array(lost[worse]) - np.array(lost[better])
        flips = [np.mean(differences * signs) for signs in itertools.product((1, -1), repeat=6)]
        p = np.mean([flipped >= differences.mean() - 1e-12 for flipped in flips])
        assert result["methods"][better][0]["p"] == pytest.approx(min(1, p * 6))
    assert result["methods"][names[-1]][0]["p"] is None


def test_baselines_on_demand_and_the_same_with_the_same_seed(runs):
    run_del, run_inj, *_ = runs
    with_baselines = compare(Settings(run_del, run_inj, baselines=True))
    assert "random" in with_baselines["methods"]
    assert with_baselines == compare(Settings(run_del, run_inj, baselines=True))


def test_the_table(runs, capsys):
    run_del, run_inj, *_ = runs
    print_agreement(compare(Settings(run_del, run_inj)))
    shown = capsys.readouterr().out
    assert "Kendall's tau-b" in shown
    assert all(method in shown for method in METHODS)


def test_what_cannot_be_compared(runs, tmp_path):
    run_del, run_inj, *_ = runs
    with pytest.raises(ValueError, match="is a run of inj; the first is of del"):
        compare(Settings(run_inj, run_del))
    with pytest.raises(ValueError, match=r"no records at the ratio 0\.5; it has 0\.1"):
        compare(Settings(run_del, run_inj, del_ratio=0.5))
    with pytest.raises(ValueError, match="holds no finished run"):
        compare(Settings(tmp_path / "nothing", run_inj))
    two = {"a": [1.0, 2.0], "b": [1.0, 3.0]}
    few = write_run(tmp_path / "few", "inj", "recall@0.01", 0.01, two)
    with pytest.raises(ValueError, match="share the methods a, b; a comparison needs 3"):
        compare(Settings(run_del, few))
