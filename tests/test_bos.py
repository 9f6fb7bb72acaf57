"""The token before a text: by default what the tokenizer's configuration says; part of the prompt, never a target."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conftest import make_original
from memloc_lens import MemorizedSequence, load_definitions, load_model, load_sequences
from memloc_lens.benchmarks import deletion, injection
from memloc_lens.benchmarks.deletion import DeletionSettings
from memloc_lens.benchmarks.injection import InjectionSettings
from memloc_lens.data import find
from memloc_lens.data.found import FindSettings
from memloc_lens.metrics import row_losses, text_rows

TOKENS = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "ab": 5}
TEXT = "abcab"
IDS = [5, 4, 5]


def save_folder(folder, template="<s> $A", bos="<s>"):
    """A small Llama and a tokenizer whose configuration puts tokens around texts as the template says."""
    make_original("llama").save_pretrained(folder)
    tokenizer = Tokenizer(BPE(TOKENS, [("a", "b")]))
    tokenizer.decoder = Fuse()
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["<s> $A", "$A"], ids=["with", "without"])
def model(request, tmp_path_factory):
    return load_model(save_folder(tmp_path_factory.mktemp("bos"), request.param), device="cpu")


@pytest.fixture(scope="module")
def first(model, tmp_path_factory):
    """What the tokenizer itself puts before a text."""
    folder = save_folder(tmp_path_factory.mktemp("plain"), "<s> $A" if model.cfg.default_prepend_bos else "$A")
    return AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"][: -len(IDS)]


def test_from_text(model, first):
    for bos, expected in ((None, first), (True, [0]), (False, [])):
        sequence = MemorizedSequence.from_text(model, TEXT, 1, bos=bos)
        assert sequence.tokens.tolist() == [*expected, *IDS]
        assert sequence.prompt_len == len(expected) + 1
        assert sequence.suffix.tolist() == IDS[1:]


def test_a_text_that_begins_with_one_gets_no_second(model):
    assert MemorizedSequence.from_text(model, "<s>ab", 1, bos=True).tokens.tolist() == [0, 5]


def test_sequences_and_definitions(model, first, tmp_path):
    rows = [{"all": TEXT, "prompt": "ab", "prompt_len": 1}, {"tokens": IDS, "prompt": "ab", "prompt_len": 1}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for load in (load_sequences, load_definitions):
        for bos, before_text, before_tokens in ((None, first, []), (True, [0], [0]), (False, [], [])):
            text, tokens = load(model, file, bos=bos)
            assert (text.tokens.tolist(), text.prompt_len) == ([*before_text, *IDS], len(before_text) + 1)
            assert (tokens.tokens.tolist(), tokens.prompt_len) == ([*before_tokens, *IDS], len(before_tokens) + 1)
    cut = load_definitions(model, file, max_tokens=2, bos=True)[0]
    assert cut.tokens.tolist() == [0, *IDS[:2]]


def test_held_out_text(model, first):
    """Every row begins with the token, and is as long as without."""
    stream = [*IDS, 1] * 6
    rows = text_rows(model, [TEXT] * 6, tokens=20, length=5)
    width = 5 - len(first)
    assert rows.tolist() == [[*first, *stream[width * row : width * (row + 1)]] for row in range(4)]
    assert text_rows(model, [TEXT] * 6, tokens=20, length=5, bos=False).flatten().tolist() == stream[:20]


def test_generation_of_strings(model, first):
    written = model.generate(TEXT, max_new_tokens=1, do_sample=False, return_type="tokens", verbose=False)
    assert written[0, :-1].tolist() == [*first, *IDS]


def test_a_token_that_the_tokenizer_lacks_is_one_error(model, gpt2, monkeypatch):
    monkeypatch.setattr(type(model.tokenizer), "bos_token_id", None, raising=False)
    for call in (
        lambda: MemorizedSequence.from_text(model, TEXT, 1, bos=True),
        lambda: MemorizedSequence(IDS, 1).after_bos(model),
        lambda: text_rows(model, [TEXT], 3, 3, bos=True),
    ):
        with pytest.raises(ValueError, match="a tokenizer without a beginning-of-sequence token; leave bos out"):
            call()
    with pytest.raises(ValueError, match="has no tokenizer; leave bos out"):
        MemorizedSequence(IDS, 1).after_bos(gpt2)


def test_texts_of_a_tokenizer_without_end_are_joined(model):
    end, model.tokenizer.eos_token = model.tokenizer.eos_token, None
    try:
        assert text_rows(model, [TEXT] * 2, 6, 6, bos=False).tolist() == [IDS * 2]
    finally:
        model.tokenizer.eos_token = end


@torch.no_grad()
def test_the_token_is_never_a_target(model):
    """The losses of text rows are those of all tokens but the first of each row."""
    rows = text_rows(model, [TEXT] * 8, 32, 16, bos=True)
    log_probs = model(rows, return_type="logits").log_softmax(-1)[:, :-1]
    expected = -log_probs.gather(2, rows[:, 1:, None])[..., 0].mean(dim=1)
    assert torch.allclose(row_losses(model, rows).float(), expected, atol=1e-5)


@pytest.mark.parametrize("bos", [None, True, False])
def test_what_is_found_can_be_loaded(model, first, tmp_path, bos):
    """The tokens of a found sequence are those that the model read; its text is that of the corpus."""
    (tmp_path / "corpus.txt").write_text("abcabbcacabcab" * 3)
    settings = FindSettings(
        corpus=(str(tmp_path / "corpus.txt"),), model=model.cfg.model_name, out=tmp_path / "out", prompt=3, suffix=4,
        min_accuracy=0, max_distance=-1, min_distinct=1, near_duplicate=1, dev=0, device="cpu", bos=bos,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FindSettings, "load_model", lambda settings: model)
        find.run(settings)
    before = {None: first, True: [0], False: []}[bos]
    rows = [json.loads(line) for line in (tmp_path / "out" / "sequences.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        assert row["tokens"][: len(before)] == before
        assert row["prompt_len"] == 3 + len(before)
        assert model.tokenizer(row["all"], add_special_tokens=False)["input_ids"] == row["tokens"][len(before) :]
        assert model.tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] == row["tokens"][len(before) :][:3]
    loaded = load_sequences(model, tmp_path / "out" / "sequences.jsonl", "guessable")
    assert sorted(sequence.tokens.tolist() for sequence in loaded) == sorted(row["tokens"] for row in rows)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["begins_with_bos"] == bool(before)


def test_runs_record_and_use_it(tmp_path):
    """Of a folder whose tokenizer puts the token before texts."""
    folder = save_folder(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"id": text, "all": text, "prompt_len": 1}) + "\n" for text in (TEXT, "bcab", "cabc"))
    )
    (tmp_path / "held_out.txt").write_text(TEXT * 20)
    shared = dict(
        model=str(folder), data=tmp_path / "data.jsonl", device="cpu", methods=("activations",), ratios=(0.1,)
    )
    for bos, length in ((None, 4), (False, 3)):
        settings = DeletionSettings(
            **shared, out=tmp_path / f"del{bos}", bos=bos, text=tmp_path / "held_out.txt", text_tokens=80
        )
        material = deletion.load_material(settings)
        assert {len(sequence.tokens) for sequence in material.targets} <= {length, length + 1}
        assert (material.text[:, 0] == 0).all() == (bos is None)
        texts = injection.load_material(InjectionSettings(**shared, out=tmp_path / f"inj{bos}", bos=bos)).texts
        assert [text.prompt_len for text in texts] == [1 + (bos is None)] * 3
