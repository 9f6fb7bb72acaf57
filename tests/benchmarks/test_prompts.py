"""Other prompts of DEL: what they are, and that they change no other value."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_model

from conftest import Killed, records_of
from memloc_lens import Activations, MemorizedSequence, ablate, load_model, load_sequences, top_neurons
from memloc_lens.benchmarks.deletion import run
from memloc_lens.benchmarks.prompts import cut, perturbed
from memloc_lens.metrics import free_running, suffix_accuracy

OTHERS = {"self_cut_acc", "self_perturbed_acc"}


@pytest.mark.parametrize("prompt_len", [1, 2, 7, 8, 9, 31])
def test_the_other_prompts(prompt_len):
    model = tiny_model(n_ctx=60)
    tokens = torch.randint(model.cfg.d_vocab, (prompt_len + 5,), generator=torch.Generator().manual_seed(prompt_len))
    sequence = MemorizedSequence(tokens, prompt_len, id="x", category="c")
    shorter, other = cut(model, sequence), perturbed(model, sequence)
    assert shorter.prompt[0].tolist() == tokens[:prompt_len].tolist()[-((prompt_len + 1) // 2) :]
    changed = (other.tokens != tokens).nonzero().flatten().tolist()
    assert changed == ([prompt_len - 1] if prompt_len < 8 else list(range(7, prompt_len, 8)))
    assert other.prompt_len == prompt_len
    assert 0 <= int(other.tokens.min()) <= int(other.tokens.max()) < model.cfg.d_vocab
    again = perturbed(model, MemorizedSequence(tokens.clone(), prompt_len, id="another"))
    assert torch.equal(other.tokens, again.tokens)
    for varied in (shorter, other):
        assert torch.equal(varied.suffix, sequence.suffix)
        assert (varied.id, varied.category) == ("x", ("c",))


def test_a_first_token_stays_first(embedded):
    sequence = load_sequences(embedded)[0].after_bos(embedded)
    bos = embedded.tokenizer.bos_token_id
    assert sequence.tokens[0] == cut(embedded, sequence).tokens[0] == perturbed(embedded, sequence).tokens[0] == bos
    assert cut(embedded, sequence).prompt_len == 17


@pytest.fixture(scope="module")
def settings(small_del, tmp_path_factory):
    chosen = replace(small_del, methods=("activations",), prompts=True, out=tmp_path_factory.mktemp("prompts") / "run")
    run(chosen)
    return chosen


def test_they_are_recorded_and_nothing_else_changes(settings, tmp_path):
    plain = replace(settings, prompts=False, out=tmp_path / "plain")
    summary = run(plain)
    assert not OTHERS & set(summary["methods"]["activations"]["0.1"])
    records = records_of(settings.out)
    for record in records:
        assert record.keys() >= OTHERS
    without = [{name: value for name, value in record.items() if name not in {*OTHERS, "crc32"}} for record in records]
    assert without == [
        {name: value for name, value in record.items() if name != "crc32"} for record in records_of(plain.out)
    ]
    with pytest.raises(ValueError, match="prompts is None there and True here"):
        run(replace(plain, prompts=True))


def test_records_by_hand(settings):
    model = load_model(settings.model, device="cpu")
    records = {(record["sequence"], record["ratio"]): record for record in records_of(settings.out)}
    changes = []
    for target in load_sequences(model, settings.data)[: settings.limit]:
        scores = Activations()(model, target)
        for name, vary in (("self_cut_acc", cut), ("self_perturbed_acc", perturbed)):
            varied = vary(model, target)
            before = suffix_accuracy(free_running(model, [varied]), [varied]).item()
            assert records[target.id, 0.0][name] == pytest.approx(before, abs=1e-4)
            for ratio in settings.ratios:
                with ablate(model, top_neurons(scores, ratio, first_layer=1)):
                    after = suffix_accuracy(free_running(model, [varied]), [varied]).item()
                changes.append(after - before)
                assert records[target.id, ratio][name] == pytest.approx(changes[-1], abs=1e-4)
    assert len(set(changes)) > 2


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_records(settings, tmp_path, dies_after):
    again = replace(settings, out=tmp_path / "run", until="greedy")
    whole = replace(settings, out=tmp_path / "whole", until="greedy")
    run(whole)
    for count in (2, 5, 8):
        dies_after(count)
        with pytest.raises(Killed):
            run(again)
    dies_after(0)
    run(again)
    assert records_of(again.out) == records_of(whole.out)
