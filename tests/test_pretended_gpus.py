"""The pretended GPUs refuse what GPUs refuse, and nothing else."""

import pytest
import torch
from pretended_gpus import CPU

FIRST, SECOND = (torch.device("cuda", index) for index in range(2))


ONE, OTHER = (lambda: torch.ones(3, device="cuda:0")), (lambda: torch.ones(3, device="cuda:1"))
MIXTURES = {
    "sum": lambda: ONE() + OTHER(),
    "CPU": lambda: ONE() + torch.ones(3),
    "number": lambda: ONE() + OTHER().sum(),
    "number on the CPU": lambda: torch.stack([ONE().sum(), torch.ones(())]),
    "product": lambda: ONE() @ OTHER(),
    "in place": lambda: ONE().mul_(OTHER()),
    "index": lambda: ONE()[OTHER().long().sub(1)],
    "index of the CPU": lambda: torch.ones(3)[ONE().long()],
    "assignment": lambda: ONE().__setitem__(torch.tensor([0]), OTHER()[:1]),
    "where": lambda: torch.where(ONE() > 0, OTHER(), 0.0),
    "cat": lambda: torch.cat([ONE(), OTHER()]),
    "linear": lambda: torch.nn.functional.linear(ONE(), torch.ones(2, 3, device="cuda:1")),
    "module": lambda: torch.nn.Linear(3, 3).to("cuda:1")(ONE()),
}  # fmt: skip


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_the_pretended_gpus_refuse(gpus, mixture):
    with gpus, pytest.raises(RuntimeError, match=r"expected all tensors on one device, but .* got c.* and cuda:"):
        mixture()


def test_the_pretended_gpus_allow(gpus):
    with gpus:
        assert (ONE() + torch.ones(())).device == FIRST
        assert (OTHER().sum() * OTHER()).device == SECOND
        assert OTHER()[torch.tensor([0])].device == SECOND
        assert (ONE().to("cuda:1") + OTHER().to(SECOND) + ONE().to(OTHER())).device == SECOND
        assert torch.ones(3).copy_(OTHER()).device == CPU
        assert ONE().double().device == torch.zeros_like(ONE()).device == FIRST
        assert OTHER().cpu().numpy().tolist() == OTHER().tolist() == [1, 1, 1]
        weight = ONE().requires_grad_(True)
        (weight.to(SECOND) * OTHER()).sum().backward()
        assert weight.grad.device == FIRST
        with pytest.raises(TypeError, match="can't convert cuda:1 device type tensor to numpy"):
            OTHER().numpy()
