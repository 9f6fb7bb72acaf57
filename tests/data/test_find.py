import json
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from conftest import VOCAB
from memloc_lens import load_model
from memloc_lens.data import find, load_sequences, search
from memloc_lens.data.find import FindSettings, run
from memloc_lens.data.guessing import copied_share
from memloc_lens.metrics import free_running, suffix_accuracy, teacher_forced, text_distance
from memloc_lens.models import EMBEDDED
from memloc_lens.runs.folder import RunFolder
from memloc_lens.sequence import MemorizedSequence


@pytest.fixture(scope="module")
def corpus(embedded, tmp_path_factory):
    """Documents that begin with eight memorized passages and six others; one comes twice, one nearly so."""
    memorized, controls = load_sequences(embedded)[:8], load_sequences(embedded, split="control")[:6]
    texts = [sequence.text(embedded) for sequence in memorized + controls]
    texts += [texts[0], texts[1] + " And more of it."]
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "category": ["docs"]}) + "\n" for text in texts))
    return path


@pytest.fixture
def settings(corpus, tmp_path):
    return FindSettings((str(corpus),), out=tmp_path / "found", batch=5, dev=2)


def found(settings) -> list[dict]:
    return [json.loads(line) for line in (settings.out / "sequences.jsonl").read_text().splitlines()]


def test_memorized_passages_are_found_and_no_others(embedded, settings):
    report = run(settings)
    rows = found(settings)
    assert {row["all"] for row in rows} == {sequence.text(embedded) for sequence in load_sequences(embedded)[:8]}
    assert report["unit"] == "characters"
    counts = report["counts"]
    assert (counts["windows"], counts["without exact duplicates"], counts["accurate"]) == (16, 14, 8)
    assert counts["without near-duplicates"] == 8
    assert (counts["dev"], counts["guessable"], counts["test"]) == (2, 0, 6)
    assert json.loads((settings.out / "report.json").read_text()) == report


def test_every_number_is_that_of_the_definition(embedded, settings):
    run(settings)
    for row in found(settings):
        sequence = MemorizedSequence(torch.tensor(row["tokens"]), row["prompt_len"])
        assert row["accuracy"] == pytest.approx(
            suffix_accuracy(teacher_forced(embedded, [sequence]), [sequence])[0].item(), abs=0.01
        )
        generated = free_running(embedded, [sequence])
        assert row["distance"] == text_distance(embedded, generated, [sequence])[0]
        assert row["distinct"] == len(generated[0].unique())
        assert row["all"].startswith(row["prompt"])
        assert min(row["foreign_distance"], row["shuffled_distance"]) > 20
        assert row["category"] == ["docs"]


def test_the_data_set_is_read_by_the_benchmarks(embedded, settings):
    run(settings)
    path = settings.out / "sequences.jsonl"
    assert len(load_sequences(embedded, path)) == 6
    assert len(load_sequences(embedded, path, split="dev")) == 2


def test_near_duplicates_are_merged(settings):
    """Windows that overlap share 5-grams, and those of one text are joined."""
    overlapping = replace(
        settings, prompt=16, suffix=32, stride=16, min_accuracy=0.0, max_distance=-1, min_distinct=1, batch=64
    )
    counts = run(overlapping)["counts"]
    close = counts["generated within the distance"]
    assert close == counts["without exact duplicates"] >= 14 * 3
    assert counts["without near-duplicates"] == 14
    apart = run(replace(overlapping, near_duplicate=1.0, out=settings.out / "all"))
    assert apart["counts"]["without near-duplicates"] == close


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_result(settings, monkeypatch):
    whole = replace(settings, out=settings.out / "whole")
    run(whole)
    append = RunFolder.append
    total = len((whole.out / "records.jsonl").read_text().splitlines())
    for stop in range(1, total, 2):

        def append_or_die(self, record, stop=stop):
            if len(self.records) == stop:
                raise KeyboardInterrupt
            append(self, record)

        monkeypatch.setattr(RunFolder, "append", append_or_die)
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    monkeypatch.setattr(RunFolder, "append", append)
    run(settings)
    assert found(settings) == found(whole)
    monkeypatch.setattr(search, "teacher_forced", None)  # nothing is left to run
    run(settings)


def test_a_corpus_that_changed_is_refused(corpus, settings, tmp_path):
    lines = corpus.read_text().splitlines(keepends=True)
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    settings = replace(settings, corpus=(str(tmp_path / "texts.jsonl"),))
    run(settings)
    (tmp_path / "texts.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match="the corpus is not the one"):
        run(settings)


def test_a_corpus_that_lost_text_is_refused_where_it_matters(corpus, settings, tmp_path):
    """The batches that are left are the same, but the windows that the model generates are not."""
    lines = corpus.read_text().splitlines(keepends=True)
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    settings = replace(settings, corpus=(str(tmp_path / "texts.jsonl"),))
    run(settings)
    (tmp_path / "texts.jsonl").write_text("".join(lines[: settings.batch]))
    with pytest.raises(ValueError, match="the corpus is not the one"):
        run(settings)


@pytest.mark.parametrize("limit", [0, 15])
def test_a_corpus_that_changed_where_nothing_is_recorded_yet_is_refused(corpus, settings, tmp_path, monkeypatch, limit):
    """Windows before and after the change would be counted as one corpus."""
    lines = corpus.read_text().splitlines(keepends=True)
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(lines))
    settings = replace(settings, corpus=(str(path),), batch=2, limit=limit)
    kept = RunFolder.append

    def append_or_die(self, record):
        if len(self.records) == 2:
            raise KeyboardInterrupt
        kept(self, record)

    monkeypatch.setattr(RunFolder, "append", append_or_die)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    monkeypatch.setattr(search, "_scanned", None)  # refused before any work
    changes = {
        "rewritten": [*lines[:2], *(line.replace(" the ", " a ") for line in lines[2:])],
        "shorter": lines[:-4],
        "longer": [*lines[:8], lines[8].replace('"text": "', '"text": "' + "And. " * 9), *lines[9:]],
    }
    for changed in changes.values():
        path.write_text("".join(changed))
        with pytest.raises(ValueError, match="the corpus is not the one"):
            run(settings)


def test_a_corpus_may_change_after_the_limit(corpus, settings, tmp_path):
    lines = corpus.read_text().splitlines(keepends=True)
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(lines))
    settings = replace(settings, corpus=(str(path),), limit=3)
    report = run(settings)
    path.write_text("".join(lines[:3]) + '{"text": "more"}\n')
    assert run(settings) == report


def test_a_corpus_that_was_too_short_may_grow(corpus, settings, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one"}\n')
    settings = replace(settings, corpus=(str(path),), limit=2)
    with pytest.raises(ValueError, match="no window of 80 tokens"):
        run(settings)
    path.write_text(corpus.read_text())
    assert run(settings)["counts"]["windows"] == 2


def test_a_file_of_a_folder_that_cannot_be_read_is_refused_first(corpus, settings, tmp_path):
    """With other names the run goes on in its folder."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text(corpus.read_text())
    (tmp_path / "texts" / "package.json").write_text('{"name": "package"}')
    settings = replace(settings, corpus=(str(tmp_path / "texts"),))
    with pytest.raises(ValueError, match=r"package\.json, line 1: .*; to leave the file out, choose files with names"):
        run(settings)
    assert not settings.out.exists()
    run(replace(settings, names=("*.jsonl",)))
    assert len(found(settings)) == 8
    (tmp_path / "texts" / "package.json").unlink()
    run(settings)


def test_a_limit_leaves_out_the_files_after_it(corpus, settings, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text(corpus.read_text())
    (tmp_path / "texts" / "package.json").write_text('{"name": "package"}')
    assert run(replace(settings, corpus=(str(tmp_path / "texts"),), limit=3))["counts"]["windows"] == 3


@pytest.mark.slow
def test_any_engine_gives_the_same_result(settings):
    """Workers that load the model themselves, and records that arrive in another order."""

    def backwards(make_worker, jobs):
        worker = pickle.loads(pickle.dumps(make_worker))()
        for job in reversed(pickle.loads(pickle.dumps(list(jobs)))):
            yield from worker(job)

    run(settings)
    elsewhere = replace(settings, out=settings.out / "elsewhere")
    run(elsewhere, backwards)
    assert found(elsewhere) == found(settings)


def test_nothing_memorized(embedded, settings, tmp_path):
    texts = [sequence.text(embedded) for sequence in load_sequences(embedded, split="control")[:3]]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    report = run(replace(settings, corpus=(str(tmp_path / "texts.jsonl"),)))
    assert (report["counts"]["windows"], report["counts"]["test"]) == (3, 0)
    assert found(settings) == []


@pytest.mark.parametrize(("right", "passed"), [(6, 0), (7, 14), (8, 14)])
def test_the_accuracy_asked_for_is_enough(settings, monkeypatch, right, passed):
    def predict(model, sequences, batch):
        suffixes = [sequence.suffix for sequence in sequences]
        return [torch.where(torch.arange(10) < right, suffix, suffix + 1) for suffix in suffixes]

    monkeypatch.setattr(search, "teacher_forced", predict)
    settings = replace(settings, prompt=70, suffix=10, min_accuracy=0.7, min_distinct=1)
    assert run(settings)["counts"]["accurate"] == passed


def test_a_limit_counts_different_windows(settings):
    assert run(replace(settings, limit=3))["counts"]["without exact duplicates"] == 3


def test_guessable_sequences_are_set_aside(embedded, settings, monkeypatch):
    """A model that says the same whatever the prompt has memorized nothing."""
    known = {sequence.tokens[:32].tolist()[0]: sequence for sequence in load_sequences(embedded)[:8]}
    always = known[next(iter(known))].suffix

    def generate_always(model, sequences, batch):
        return [always if torch.equal(one.suffix, always) else free_running(model, [one])[0] for one in sequences]

    monkeypatch.setattr(search, "free_running", generate_always)
    run(settings)
    reasons = {tuple(row["guessable"]): row["split"] for row in found(settings)}
    assert reasons[("shuffled prompt", "foreign prompt")] == "guessable"
    assert set(reasons) == {(), ("shuffled prompt", "foreign prompt")}


def test_tokens_of_a_model_without_a_tokenizer(folder, tmp_path):
    """What a model generates by itself it has memorized by definition; distances then count tokens."""
    model = load_model(folder, device="cpu")
    prompts = torch.randint(VOCAB, (6, 16), generator=torch.Generator().manual_seed(0))
    blank = [MemorizedSequence(torch.cat([prompt, torch.zeros(8, dtype=torch.long)]), 16) for prompt in prompts]
    rows = torch.stack(
        [torch.cat([prompt, suffix]) for prompt, suffix in zip(prompts, free_running(model, blank), strict=True)]
    )
    torch.save(rows, tmp_path / "rows.pt")
    settings = FindSettings(
        (str(tmp_path / "rows.pt"),), str(folder), tmp_path / "out", prompt=16, suffix=8, min_distinct=1, dev=0
    )
    report = run(settings)
    assert report["unit"] == "tokens"
    assert report["counts"]["accurate"] == report["counts"]["generated within the distance"] == 6


def test_copied_share():
    assert copied_share(list(range(80)), 32) == 0
    assert copied_share([1, 2, 3, 4] * 20, 32) == 1
    assert copied_share([1, 2, 3, 1, 2, 3, 1, 2], prompt_len=4) == 0.75


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": 0}, "prompt is 0; it must be a whole number at least 1"),
        ({"batch": 0}, "batch is 0"),
        ({"min_accuracy": 90.0}, "min_accuracy is 90.0; it must be a number at least 0 and at most 1"),
        ({"min_distinct": 49}, "the suffix has only 48"),
        ({"suffix": 100}, "132 tokens, and embedded reads at most 128"),
        ({"corpus": ("nowhere",)}, "no corpus at 'nowhere'"),
        ({"corpus": ()}, "no corpus was given"),
        ({"names": ()}, "names is empty"),
        ({"model": "nowhere/none.gguf"}, "no model at"),
        ({"device": "gpu"}, "device is 'gpu'"),
    ],
)
def test_bad_settings(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        run(replace(settings, **changes))


def test_a_corpus_too_short(settings, tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(ValueError, match="no window of 80 tokens"):
        run(replace(settings, corpus=(str(tmp_path / "short.txt"),)))


def test_the_command(corpus, tmp_path, monkeypatch):
    command = [sys.executable, "-m", "memloc_lens.data.find", "--corpus"]
    done = subprocess.run([*command, str(corpus), "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "without near-duplicates" in done.stdout
    monkeypatch.setattr(sys, "argv", ["find", "--corpus", "nowhere"])
    with pytest.raises(SystemExit, match=r"^error: no corpus at 'nowhere'"):
        find.main()


def test_ground_truth_of_the_embedded_model(embedded, tmp_path):
    """Of every fourth of the 480 passages whose repeats in training are known, the memorized ones and no others."""
    rows = [json.loads(line) for line in (EMBEDDED / "sequences.jsonl").read_text().splitlines()][::4]
    (tmp_path / "passages.jsonl").write_text("".join(json.dumps({"text": row["all"]}) + "\n" for row in rows))
    settings = FindSettings((str(tmp_path / "passages.jsonl"),), out=tmp_path / "out", batch=64)
    run(settings)
    memorized = {row["all"] for row in rows if row["split"] in ("dev", "test")}
    assert {row["all"] for row in found(settings)} == memorized
