"""LAMB on one process; test_optim.py has it sharded over two."""

import copy
import math

import pytest
import torch
from pytorch_optimizer import Lamb as PackagedLamb

from qlip.train.lamb import Lamb, adam_state


def matrices():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (2, 3, 5), (7, 1))]


def give_gradients(step, *parameters):
    for own in parameters:
        torch.manual_seed(step)
        for p in own:
            p.grad = torch.randn_like(p)


@pytest.mark.parametrize("weight_decay", (0.0, 0.05))
def test_it_is_the_packaged_one(weight_decay):
    # Theirs has no bias correction (adam_debias leaves out what it has), bounds ‖p‖ and adds eps to ‖u‖: so ours
    # begins late, the bound is lifted and eps is small.
    ours, theirs = matrices(), matrices()
    settings = {"lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": weight_decay}
    lamb, packaged = (
        Lamb(ours, **settings),
        PackagedLamb(theirs, weight_decouple=False, adam_debias=True, **settings),
    )
    packaged.clamp = math.inf
    for p in ours:
        lamb.state[p] = adam_state(p) | {"step": torch.tensor(1e6)}
    for step in range(20):
        give_gradients(step, ours, theirs)
        lamb.step()
        packaged.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_matrix_goes_where_adamw_would_and_as_far_as_its_norm_says():
    ours = matrices()
    twins = copy.deepcopy(ours)
    lamb = Lamb(ours, lr=0.03, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.05)
    adamw = torch.optim.AdamW(twins, lr=1.0, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.05)
    for step in range(5):
        before = [p.detach().clone() for p in ours]
        for twin, p in zip(twins, before, strict=True):
            twin.data.copy_(p)
        give_gradients(step, ours, twins)
        lamb.step()
        adamw.step()
        for p, twin, old in zip(ours, twins, before, strict=True):
            move = twin.detach() - old
            torch.testing.assert_close(
                p.detach(), old + 0.03 * old.norm() * move / move.norm(), rtol=1e-5, atol=1e-6
            )


def test_vectors_scalars_and_zero_matrices_take_adams_step():
    ours = [torch.nn.Parameter(x) for x in (torch.ones(5), torch.tensor(2.0), torch.zeros(3, 2))]
    theirs = copy.deepcopy(ours)
    lamb = Lamb(ours, lr=0.03, betas=(0.9, 0.95), eps=1e-6)
    adam = torch.optim.AdamW(theirs, lr=0.03, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)
    for step in range(3):
        give_gradients(step, ours, theirs)
        lamb.step()
        adam.step()
        num_alike = 3 if step == 0 else 2  # the matrix is not zero any more
        torch.testing.assert_close(ours[:num_alike], theirs[:num_alike], rtol=1e-5, atol=1e-6)


def test_a_matrix_without_gradient_or_with_a_zero_one_stays_finite():
    p, idle = matrices()[:2]
    p.grad = torch.zeros_like(p)
    before = p.detach().clone(), idle.detach().clone()
    lamb = Lamb([p, idle], lr=0.1)
    lamb.step()
    assert torch.equal(p, before[0]) and torch.equal(idle, before[1])
    assert set(lamb.state[p]) == {"step", "exp_avg", "exp_avg_sq"} and lamb.state[p]["step"] == 1
    assert idle not in lamb.state
