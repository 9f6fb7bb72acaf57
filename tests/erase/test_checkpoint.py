"""Checkpoints that plain transformers loads, against weights that are set to zero by hand."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from conftest import ARCHITECTURES, make_original, some_of
from memloc_lens import COMPONENTS, HEADS, NEURONS, WEIGHTS, load_model
from memloc_lens.erase import checkpoint, write_checkpoint
from memloc_lens.erase.compare import compare
from memloc_lens.erase.outputs import OUTPUTS
from memloc_lens.models.families import FAMILIES

EACH = pytest.mark.parametrize("component", COMPONENTS.values(), ids=COMPONENTS)
TOKENS = torch.arange(3, 17)[None]


def zeroed_by_hand(model, components, mlp: str, attention: str, by_row: bool):
    """Loop over the members, and set what each of them writes to zero in a model of transformers."""
    for layer, block in enumerate(
        model.get_decoder().layers if hasattr(model.get_decoder(), "layers") else model.get_decoder().h
    ):
        matrix = block.get_submodule(attention if components.component is HEADS else mlp).weight.data
        matrix = matrix if by_row else matrix.T
        for unit in components.layer(layer).nonzero().tolist():
            if components.component is WEIGHTS:
                matrix[unit[0], unit[1]] = 0
            elif components.component is NEURONS:
                matrix[unit[0]] = 0
            else:
                width = len(matrix) // components.shape[1]
                matrix[unit[0] * width : (unit[0] + 1) * width] = 0
    return model


MODULES = {
    "gpt2": ("mlp.c_proj", "attn.c_proj", True),
    "neox": ("mlp.dense_4h_to_h", "attention.dense", False),
    "llama": ("mlp.down_proj", "self_attn.o_proj", False),
    "llama-tied": ("mlp.down_proj", "self_attn.o_proj", False),
}


def hashes(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def logits(folder: Path, dtype=torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(TOKENS).logits


@EACH
def test_transformers_computes_what_zeros_by_hand_do(folder, architecture, component, any_model, tmp_path):
    before, chosen = hashes(folder), some_of(any_model, component)
    write_checkpoint(folder, tmp_path / "erased", chosen, model=any_model)
    expected = zeroed_by_hand(make_original(architecture), chosen, *MODULES[architecture])
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "erased"), expected(TOKENS).logits)
    assert not torch.equal(logits(tmp_path / "erased"), logits(folder))
    assert hashes(folder) == before
    told = json.loads((tmp_path / "erased" / "erasure.json").read_text())
    assert (told["component"], told["count"]) == (component.name, len(chosen))
    of_layers = {int(layer): own for layer, own in told["layers"].items()}
    assert of_layers == {layer: own for layer, own in enumerate(chosen.per_layer()) if own}


def test_every_family_has_its_outputs():
    assert OUTPUTS.keys() == FAMILIES.keys()


@pytest.mark.parametrize(
    "family", sorted(FAMILIES.keys() - {"GPT2LMHeadModel", "GPTNeoXForCausalLM", "LlamaForCausalLM"})
)
def test_families(family, tmp_path):
    families.save_original(family, tmp_path / "model")
    model = load_model(tmp_path / "model", device="cpu")
    for component in (NEURONS, HEADS):
        chosen = some_of(model, component)
        write_checkpoint(tmp_path / "model", tmp_path / component.name, chosen, model=model)
        changed = compare(tmp_path / "model", tmp_path / component.name)
        assert len(changed) == sum(map(bool, chosen.per_layer())) > 0
        assert all(own.zeroed and own.is_output and own.rows == own.zero_rows for own in changed)
        if component is NEURONS:
            assert [list(own.rows) for own in changed] == chosen.per_layer()


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gpt2")
    make_original("gpt2").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plain(gpt2_folder):
    return load_model(gpt2_folder, device="cpu")


def test_shards_in_bfloat16(tmp_path):
    make_original("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 3
    model = load_model(tmp_path / "model", device="cpu")
    chosen = some_of(model) - some_of(model, share=0.3, seed=0)
    members = chosen.members
    members[1, 5] = True
    chosen = type(chosen)(members)
    write_checkpoint(tmp_path / "model", tmp_path / "erased", chosen, model=model)
    before, after = hashes(tmp_path / "model"), hashes(tmp_path / "erased")
    (changed,) = [name for name in before if before[name] != after[name]]
    assert set(after) - set(before) == {"erasure.json"}
    with safe_open(tmp_path / "model" / changed, "pt") as one, safe_open(tmp_path / "erased" / changed, "pt") as other:
        for name in one.keys():  # noqa: SIM118
            expected, found = one.get_tensor(name).clone(), other.get_tensor(name)
            if name == "model.layers.1.mlp.down_proj.weight":
                expected[:, 5] = 0
            assert found.dtype == torch.bfloat16
            assert torch.equal(found, expected)


def test_pytorch_bin(gpt2_folder, plain, tmp_path):
    original, chosen = tmp_path / "model", some_of(plain)
    shutil.copytree(gpt2_folder, original, ignore=shutil.ignore_patterns("*.safetensors"))
    state = make_original("gpt2").state_dict()
    torch.save(state, original / "pytorch_model.bin")
    write_checkpoint(original, tmp_path / "erased", chosen)
    written = torch.load(tmp_path / "erased" / "pytorch_model.bin", weights_only=True)
    assert list(written) == list(state)
    for layer, members in enumerate(chosen.members):
        state[f"transformer.h.{layer}.mlp.c_proj.weight"][members] = 0
    assert all(torch.equal(written[name], state[name]) for name in state)


def test_what_is_carried_over_and_what_is_left_out(gpt2_folder, plain, tmp_path):
    original = tmp_path / "model"
    shutil.copytree(gpt2_folder, original)
    for name in ("LICENSE", "vocab.md", "notes/README.md", "pytorch_model.bin", "tf_model.h5", "notes/a.pth",
                 ".git/lfs/weights", "AUDIT.md"):  # fmt: skip
        (original / name).parent.mkdir(parents=True, exist_ok=True)
        (original / name).write_bytes(b"content of " + name.encode())
    (original / "LICENSE").chmod(0o444)
    write_checkpoint(original, tmp_path / "erased", some_of(plain), model=plain)
    before, after = hashes(original), hashes(tmp_path / "erased")
    left_out = {"pytorch_model.bin", "tf_model.h5", "notes/a.pth", ".git/", "AUDIT.md"}
    assert set(json.loads((tmp_path / "erased" / "erasure.json").read_text())["left_out"]) == left_out
    assert set(after) - {"erasure.json"} == {name for name in before if not any(map(name.startswith, left_out))}
    assert {name for name in after if after[name] != before.get(name)} == {"model.safetensors", "erasure.json"}


def test_a_link_is_followed(gpt2_folder, plain, tmp_path):
    original = tmp_path / "model"
    original.mkdir()
    for file in gpt2_folder.iterdir():
        (original / file.name).symlink_to(file)
    before = hashes(gpt2_folder)
    write_checkpoint(original, tmp_path / "erased", some_of(plain), model=plain)
    assert hashes(gpt2_folder) == before
    assert not any(file.is_symlink() for file in (tmp_path / "erased").iterdir())


@pytest.mark.parametrize("at", ["rename", "compare", "config"])
def test_an_error_leaves_nothing(gpt2_folder, plain, tmp_path, monkeypatch, at):
    def fail(*_):
        raise OSError("the disk is gone")

    place = {"rename": (Path, "rename"), "compare": (checkpoint, "check_written"), "config": (checkpoint, "zero")}[at]
    monkeypatch.setattr(*place, fail)
    with pytest.raises(ValueError, match="erased cannot be written: the disk is gone"):
        write_checkpoint(gpt2_folder, tmp_path / "erased", some_of(plain), model=plain)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys, torch
from memloc_lens import Neurons, load_model
from memloc_lens.erase import checkpoint
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
setattr(checkpoint, sys.argv[3], die)
model = load_model(sys.argv[1], device="cpu")
checkpoint.write_checkpoint(sys.argv[1], sys.argv[2], Neurons.from_indices(model, [(1, 5)]), model=model)
"""


def test_killed_before_it_is_whole(gpt2_folder, plain, tmp_path):
    target = tmp_path / "erased"
    killed = subprocess.run([sys.executable, "-c", KILLED, gpt2_folder, target, "zero"], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name == ".erased.part"
    with pytest.raises(ValueError, match="no model at"):
        load_model(left)
    write_checkpoint(gpt2_folder, target, some_of(plain), model=plain)
    assert os.listdir(tmp_path) == ["erased"]


def test_wrong_targets_and_sources(gpt2_folder, plain, tmp_path):
    chosen = some_of(plain)
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    for target, words in {
        tmp_path / "there": "there exists; name a folder that does not",
        gpt2_folder / "inside": "is inside the model's own folder",
        tmp_path / "file" / "erased": "erased cannot be written: File exists",
        Path("/proc/erased"): "erased cannot be written",
    }.items():
        with pytest.raises(ValueError, match=words):
            write_checkpoint(gpt2_folder, target, chosen, model=plain)
    with pytest.raises(ValueError, match="no-such-model' is not in the cache of the hub"):
        write_checkpoint("no-such-model", tmp_path / "erased", chosen, model=plain)
    with pytest.raises(ValueError, match=r"neurons of shape \[3, 128\] .* do not fit embedded"):
        write_checkpoint("embedded", tmp_path / "erased", chosen)
    other = make_original("gpt2")
    other.transformer.wte.weight.data[3] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"what was written is not the model without .*: \d+ values differ in embed.W_E"
    ):
        write_checkpoint(tmp_path / "other", tmp_path / "erased", chosen, model=plain)


def test_architectures_of_the_suite_are_covered():
    assert MODULES.keys() == set(ARCHITECTURES)
