"""Parameters in bfloat16 are trained by copies in float32; the state has these too."""

import pytest
import torch
from training_models import fit, plain

import minilora
from minilora.training.adamw import AdamW

NORM = "model.norm.weight"


def narrow(**options):
    return minilora.inject(plain().bfloat16(), r=4, alpha=6, **options)


def test_narrow_parameters_are_the_roundings_of_wide_ones():
    torch.manual_seed(0)
    start = torch.randn(7).bfloat16()
    config = minilora.TrainConfig(max_steps=1, weight_decay=0.1)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    optimizer = AdamW({ours: "norm"}, config)
    oracle = torch.optim.AdamW([theirs], betas=config.betas, eps=config.eps, weight_decay=0.1)
    for group in [*optimizer.param_groups, *oracle.param_groups]:
        group["lr"] = 1e-4
    for _ in range(50):
        ours.grad = torch.randn(7).bfloat16()
        theirs.grad = ours.grad.float()
        optimizer.step()
        oracle.step()
        optimizer.zero_grad()
        assert ours.grad is None
    torch.testing.assert_close(optimizer.wide[ours], theirs, rtol=1e-6, atol=1e-7)
    assert torch.equal(ours, optimizer.wide[ours].bfloat16())
    assert not torch.equal(ours, start)


@pytest.mark.parametrize("options", [{"modules_to_save": ["norm"]}, {"dtype": torch.bfloat16}])
def test_small_updates_of_narrow_parameters_are_kept(options):
    """At this rate every update of a norm's weight near 1 is below bfloat16's spacing."""
    moved = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = minilora.inject(plain().to(dtype), r=4, alpha=6, **options)
        before = {
            n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad
        }
        fit(model, lr=1e-3, max_steps=25, schedule="constant", dtype="auto")
        moved[dtype] = torch.cat(
            [(p.detach().float() - before[n]).flatten() for n, p in model.named_parameters()
             if n in before]
        )  # fmt: skip
    assert (moved[torch.bfloat16] != 0).float().mean() > 0.8
    agree = torch.nn.functional.cosine_similarity(moved[torch.bfloat16], moved[torch.float32], 0)
    assert agree > 0.8


def test_a_resumed_run_has_the_wide_copies(tmp_path):
    settings = {"lr": 1e-3, "schedule": "constant", "dtype": "auto"}
    whole = narrow(modules_to_save=["norm"])
    fit(whole, max_steps=9, **settings)
    part = narrow(modules_to_save=["norm"])
    fit(part, max_steps=3, out=tmp_path, **settings)
    state = minilora.files.read_tensors(tmp_path / "state.safetensors")[0]
    assert state[f"optimizer.wide.{NORM}"].dtype == torch.float32
    again = narrow(modules_to_save=["norm"])
    fit(again, max_steps=9, out=tmp_path, resume=True, **settings)
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
