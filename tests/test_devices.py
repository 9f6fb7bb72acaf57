"""Everything that runs a model, with tensors on a pretended GPU that do not mix with those on the CPU.

`PretendedGPU` keeps all numbers on the CPU, and a tag beside each tensor that says where it would be: a missing
`.to(device)` fails as it would on a GPU, and `tensor.device` is what it would be there.
"""

import pytest
import torch
from test_surroundings import LOCALIZERS, SEQUENCES, everything
from tiny import tiny_model
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from memloc_lens import memory, top_neurons
from memloc_lens.localizers import integrated_gradients
from memloc_lens.metrics import free_running

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
TO_NUMBERS = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
              Tensor.__repr__, Tensor.__format__, Tensor.__len__, Tensor.__contains__}  # fmt: skip


class PretendedGPU(TorchFunctionMode):
    """Tensors made on "cuda" are on the CPU and tagged; operations refuse tensors with different tags."""

    def __init__(self) -> None:
        super().__init__()
        self.where = WeakIdKeyDictionary()

    def put(self, module: torch.nn.Module) -> None:
        """Tag the tensors of a model."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.where[tensor] = GPU

    def of(self, tensor: Tensor) -> torch.device:
        return self.where.get(tensor, CPU)

    def __torch_function__(self, function, types, given=(), options=None):
        options = dict(options or {})
        if function is torch.device:
            return function(*given, **options)
        if function == Tensor.device.__get__:
            return self.of(given[0])
        if function in (Tensor.is_cuda.__get__, Tensor.is_cpu.__get__):
            return (self.of(given[0]) == GPU) == (function == Tensor.is_cuda.__get__)
        if function is Tensor.numpy and self.of(given[0]) == GPU:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        tensors = [value for value in tree_flatten((given, options))[0] if isinstance(value, Tensor)]
        target = self._asked(function, given, options)
        if target is None:
            target = self._common(function, tensors)
        given, options = tree_map(_on_cpu, (tuple(given), options))
        if function is Tensor.cuda:
            function, given = Tensor.clone, given[:1]
        result = function(*given, **options)
        for value in tree_flatten(result)[0]:
            if isinstance(value, Tensor):
                same = [tensor for tensor in tensors if tensor is value]
                if same and self.of(value) != target:  # a move that moved nothing
                    value = value.clone()
                    result = value
                self.where[value] = target
        return result

    def _asked(self, function, given, options) -> torch.device | None:
        """Where the result is to be, if the call says so."""
        if function is Tensor.cpu:
            return CPU
        if function is Tensor.cuda:
            return GPU
        wanted = options.get("device")
        if function is Tensor.to:
            for value in given[1:]:
                if isinstance(value, Tensor):
                    wanted = self.of(value)
                elif isinstance(value, str | torch.device):
                    wanted = value
            wanted = self.of(given[0]) if wanted is None else wanted
        if function in (Tensor.type_as,):
            wanted = self.of(given[1])
        return None if wanted is None else GPU if torch.device(wanted).type == "cuda" else CPU

    def _common(self, function, tensors: list[Tensor]) -> torch.device:
        if function in INDEXING and tensors:  # indices may be anywhere for a GPU, and numbers on the CPU for all
            first, *others = tensors
            if self.of(first) == CPU and any(self.of(other) == GPU for other in others):
                self._refuse(function)
            if function is Tensor.__setitem__ and tensors[-1].ndim and self.of(tensors[-1]) != self.of(first):
                self._refuse(function)
            return self.of(first)
        places = {self.of(tensor) for tensor in tensors if tensor.ndim}
        if len(places) > 1 and function not in TO_NUMBERS:
            self._refuse(function)
        if not places and tensors:
            return GPU if any(self.of(tensor) == GPU for tensor in tensors) else CPU
        return places.pop() if places else CPU

    def _refuse(self, function) -> None:
        raise RuntimeError(f"expected all tensors on one device, but {resolve_name(function)} got cuda:0 and cpu")


def _on_cpu(value):
    if isinstance(value, torch.device):
        return CPU
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


@pytest.fixture
def gpu(monkeypatch) -> PretendedGPU:
    monkeypatch.setattr(memory, "_free", lambda device: 2**34)
    return PretendedGPU()


def model_on(gpu: PretendedGPU, **changes):
    model = tiny_model(dtype=torch.float32, **changes)
    model.cfg.device = "cuda"
    gpu.put(model)
    return model


@pytest.mark.parametrize(
    "changes",
    [dict(positional_embedding_type="rotary", rotary_dim=4, normalization_type="RMS", gated_mlp=True,
              n_key_value_heads=1, output_logits_soft_cap=2.0),
     dict(use_normalization_before_and_after=True, normalization_type="RMS", attn_scores_soft_cap=2.0)],
    ids=["rotary", "Gemma"],
)  # fmt: skip
def test_everything_runs_on_one_device(gpu, changes):
    expected = everything(tiny_model(dtype=torch.float32, **changes), SEQUENCES)
    model = model_on(gpu, **changes)
    with gpu:
        found = everything(model, SEQUENCES)
        scores = LOCALIZERS[0](model, SEQUENCES[0])
        assert scores.device == GPU
        assert top_neurons(scores, 0.5).members.device == GPU
        predictions = free_running(model, SEQUENCES)
        assert {tokens.device for tokens in predictions} == {CPU}
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.float(), other.float(), atol=1e-5)


def test_the_plain_ways_run_on_one_device(gpu):
    model = model_on(gpu)
    model.hook_dict["blocks.1.hook_mlp_out"].add_hook(lambda activations, hook: activations * 2)
    with gpu:
        everything(model, SEQUENCES)


def test_a_missing_move_is_found(gpu, monkeypatch):
    model = model_on(gpu)
    with gpu, pytest.raises(RuntimeError, match="expected all tensors on one device"):
        model.W_E + torch.ones(model.W_E.shape)
    fractions = integrated_gradients._fractions
    monkeypatch.setattr(integrated_gradients, "_fractions", lambda steps, like: torch.linspace(0, 1, steps))
    with gpu, pytest.raises(RuntimeError, match="expected all tensors on one device"):
        integrated_gradients.IntegratedGradients(steps=2)(model, SEQUENCES[0])
    monkeypatch.setattr(integrated_gradients, "_fractions", fractions)
    with gpu:
        integrated_gradients.IntegratedGradients(steps=2)(model, SEQUENCES[0])
