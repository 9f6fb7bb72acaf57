"""Where the parts of a model are put, and how many GPUs can share it."""

import inspect
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from pretended_gpus import CPU, placed, pretended
from tiny import tiny_model, tiny_sequence
from transformers import BloomConfig, BloomForCausalLM

from memloc_lens import load_model, memory, memory_budget
from memloc_lens.benchmarks.deletion import DeletionSettings
from memloc_lens.checks import check_model
from memloc_lens.data.find import FindSettings
from memloc_lens.devices import devices_of
from memloc_lens.memory import rows_at_once
from memloc_lens.metrics import free_running, suffix_loss
from memloc_lens.models import check_device, sources
from memloc_lens.models.placement import place
from memloc_lens.report.command import ReportSettings
from memloc_lens.runs import parallel
from memloc_lens.runs.fingerprint import fingerprint
from memloc_lens.runs.parallel import Parallel

FIRST, SECOND = (torch.device("cuda", index) for index in range(2))


def test_layers_are_where_their_streams_go(gpus):
    model = placed(gpus, tiny_model(n_layers=5))
    with gpus:
        of_blocks = [{parameter.device for parameter in block.parameters()} for block in model.blocks]
        assert of_blocks == [{FIRST}, {FIRST}, {FIRST}, {SECOND}, {SECOND}]
        assert model.W_E.device == model.W_pos.device == FIRST
        assert model.W_U.device == model.ln_final.w.device == SECOND
        assert (model.cfg.device, model.cfg.n_devices) == ("cuda:0", 2)
        assert model(tiny_sequence().tokens).device == SECOND
        assert suffix_loss(model, [tiny_sequence()]).device == CPU
        assert torch.equal(placed(gpus, tiny_model(n_layers=5)).W_U.cpu(), model.W_U.cpu())
        assert fingerprint(model) == fingerprint(tiny_model(n_layers=5))


def test_one_device_is_as_before(gpus):
    assert place(tiny_model(), CPU).cfg.n_devices == 1
    with gpus:
        model = place(tiny_model(), torch.device("cuda"))
    assert (model.cfg.device, model.cfg.n_devices) == ("cuda", 1)


def test_loading(gpus, folder):
    sequence = tiny_sequence()
    expected = free_running(load_model(folder, device="cpu"), [sequence])
    with gpus:
        model = load_model(folder, device="cuda", n_devices=2)
        assert {parameter.device for parameter in model.parameters()} == {FIRST, SECOND}
        assert torch.equal(free_running(model, [sequence])[0], expected[0])


def test_a_tokenizer_that_pads_on_the_left(gpus):
    """TransformerLens then makes a mask of attention, on the first device."""
    texts = ["Return the number of", "Raise"]
    expected = load_model(device="cpu")
    with gpus:
        model = load_model(device="cuda", n_devices=2)
        found = model.generate(texts, max_new_tokens=4, do_sample=False, verbose=False)
        loss = model(texts, return_type="loss", padding_side="left")
    assert found == expected.generate(texts, max_new_tokens=4, do_sample=False, verbose=False)
    assert torch.allclose(loss, expected(texts, return_type="loss", padding_side="left"), atol=1e-5)


WRONG = {
    "n_devices is 0; it must be a whole number at least 1": dict(n_devices=0),
    "n_devices is 2 and the device is cpu; only CUDA devices share a model: leave out n_devices":
        dict(n_devices=2, device="cpu"),
    "n_devices is 3 from cuda:0 on, and the CUDA devices here are cuda:0, cuda:1; it can be at most 2":
        dict(n_devices=3),
    "n_devices is 2 from cuda:1 on, and the CUDA devices here are cuda:0, cuda:1; it can be at most 1":
        dict(n_devices=2, device="cuda:1"),
}  # fmt: skip


@pytest.mark.parametrize(("message", "options"), WRONG.items(), ids=map(str, WRONG.values()))
def test_numbers_of_devices_that_cannot_be(gpus, message, options):
    for call in (inspect.unwrap(check_device), partial(inspect.unwrap(load_model), "no-such-model")):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            call(**({"device": None} | options))
    for kind in (DeletionSettings, partial(FindSettings, ("corpus",)), partial(ReportSettings, (Path("a"),))):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            kind(**options)


def test_mps_has_one_device(gpus, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"^n_devices is 2 and the device is mps; only CUDA devices share a model"):
        check_device("mps", 2)


def test_models_that_cannot_be_shared(monkeypatch, folder, tmp_path):
    """They are refused before their weights are read."""
    pretended(monkeypatch, 4)
    monkeypatch.setattr(sources, "_read_weights", None)
    with pytest.raises(ValueError, match="n_devices is 4, and the model has 3 layers; it can be at most that"):
        load_model(folder, n_devices=4)
    with pytest.raises(ValueError, match="n_devices is 2, and a TransformerBridge must be on one device"):
        load_model(folder, n_devices=2, backend="bridge")
    BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=8, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"n_devices is 2, and .* position biases .* \(alibi\) on one device; leave"):
        load_model(tmp_path, n_devices=2)


def test_a_bridge_on_several_devices_is_refused():
    model = load_model(device="cpu", backend="bridge")
    model.cfg.n_devices = 2
    with pytest.raises(ValueError, match="is a TransformerBridge on 2 devices, and it must be on one; load it without"):
        check_model(model)


def test_layers_that_are_elsewhere_are_refused(gpus):
    model = placed(gpus, tiny_model())
    with gpus:
        model.to("cuda:0", print_details=False)
        with pytest.raises(
            ValueError, match=r"layer 1 of custom is on cuda:0, and .* its input goes to cuda:1; load the"
        ):
            suffix_loss(model, [tiny_sequence()])
        model.to("cpu", print_details=False)
        suffix_loss(model, [tiny_sequence()])


def test_workers_have_as_many_gpus_as_their_models(gpus, monkeypatch):
    monkeypatch.setattr(parallel, "find_spec", lambda name: object())
    assert Parallel("ray").engine_for("cuda:0", 2).gpus == 2
    with pytest.raises(ValueError, match=r"^n_devices is 2 and gpus_per_worker is 0\.5; give every worker as many"):
        DeletionSettings(n_devices=2, parallel=Parallel("ray", gpus_per_worker=0.5))
    settings = DeletionSettings(n_devices=2, parallel=Parallel("ray", gpus_per_worker=2))
    assert settings.parallel.engine_for("cuda:0", 2).gpus == 2


def test_a_budget_is_that_of_each_device(gpus, monkeypatch):
    model, taken, free = placed(gpus, tiny_model()), {FIRST: 2**30, SECOND: 2**31}, {FIRST: 2**34, SECOND: 2**20}
    monkeypatch.setattr(memory, "_taken", taken.__getitem__)
    monkeypatch.setattr(memory, "_free", free.__getitem__)
    assert devices_of(model) == [FIRST, SECOND]
    with (
        pytest.raises(ValueError, match=r"memory is 1\.5GiB, and 2\.00 GiB are taken"),
        memory_budget("1.5GiB", [FIRST, SECOND]),
    ):
        pass
    few = rows_at_once(model, 8, 4)
    free[SECOND] = 2**34
    assert few < rows_at_once(model, 8, 4)
