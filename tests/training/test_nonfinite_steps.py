"""In fp32 without ZeRO a bad step is left out on the device; the host is told where it reads numbers anyway."""

import copy
import json
from pathlib import Path

import pytest
import torch

from kvds.training.engine import clip_on_the_device
from kvds.training.nonfinite_steps import leave_out_nonfinite_steps
from tests.harness.plain_steps import check_steps
from tests.harness.survival_runs import REPOSITORY, at_step, check_equal, make_models, records, spoil, starter

OPTIMIZERS = {
    "adamw": lambda weights, **options: torch.optim.AdamW(weights, lr=0.1, weight_decay=0.1, **options),
    "sgd": lambda weights, **options: torch.optim.SGD(weights, lr=0.1, weight_decay=0.1, **options),
}
NAN, INF = float("nan"), float("inf")


def weights_and_optimizer(name: str, **options) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((5, 3), (7,))]
    return weights, OPTIMIZERS[name](weights, **options)


def take(weights, optimizer, seed: int, spoiled: float | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    if spoiled is not None:
        weights[1].grad[4] = spoiled
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_others_are_taken_as_if_bad_ones_had_not_been(name):
    weights, optimizer = weights_and_optimizer(name, fused=True)
    leave_out_nonfinite_steps(optimizer)
    flags = []
    for seed, spoiled in enumerate((NAN, None, INF, -INF, None)):
        take(weights, optimizer, seed, spoiled)
        flags.append(optimizer.left_out)
    assert torch.stack(flags).tolist() == [1, 0, 1, 1, 0]
    plain_weights, plain = weights_and_optimizer(name, fused=True)
    for seed in (1, 4):
        take(plain_weights, plain, seed)
    assert all(torch.equal(one, two) for one, two in zip(weights, plain_weights, strict=True))
    for one, two in zip(weights, plain_weights, strict=True):
        state, expected = optimizer.state.get(one, {}), plain.state.get(two, {})
        assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
        assert name == "sgd" or float(state["step"]) == 2


def test_an_optimizer_whose_kernel_reads_no_flag_is_left_out_on_the_host():
    weights, optimizer = weights_and_optimizer("adamw", fused=False)
    leave_out_nonfinite_steps(optimizer)
    before = [weight.detach().clone() for weight in weights]
    take(weights, optimizer, 0, NAN)
    assert bool(optimizer.left_out) and all(map(torch.equal, weights, before)) and not optimizer.state
    take(weights, optimizer, 1)
    assert not optimizer.left_out and not any(map(torch.equal, weights, before))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_of_a_version_that_did_not_fuse_goes_on_fused(name):
    earlier_weights, earlier = weights_and_optimizer(name)
    take(earlier_weights, earlier, 0)
    weights, optimizer = weights_and_optimizer(name, fused=True)
    leave_out_nonfinite_steps(optimizer)
    with torch.no_grad():
        for weight, saved in zip(weights, earlier_weights, strict=True):
            weight.copy_(saved)
    optimizer.load_state_dict(copy.deepcopy(earlier.state_dict()))
    take(weights, optimizer, 1, INF)
    assert all(map(torch.equal, weights, earlier_weights))
    take(weights, optimizer, 2)
    take(earlier_weights, earlier, 2)
    assert all(torch.allclose(*pair, rtol=1e-6, atol=1e-7) for pair in zip(weights, earlier_weights, strict=True))


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping_is_that_of_the_norm_over_all_parameters(max_norm):
    weights, optimizer = weights_and_optimizer("sgd")
    clip_on_the_device(optimizer, max_norm)
    take(weights, optimizer, 0)
    norm = torch.cat([torch.randn(s, generator=g) for g in [torch.Generator().manual_seed(0)] for s in (15, 7)]).norm()
    got = torch.cat([weight.grad.flatten() for weight in weights]).norm()
    assert float(got) == pytest.approx(min(float(norm), max_norm), rel=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_step_makes_the_host_read_a_number(optimizer, tmp_path):
    check_steps("cpu", optimizer, tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def start(rank_server, folder):
    return starter(rank_server, folder)


STAGE0 = {"deepspeed_config": REPOSITORY / "ds_configs/zero0_fp32.json", "batch_size": 1}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bad_steps_then_a_resume_end_in_the_same_bits(optimizer, start, folder):
    """Steps 1, 2 and 5 of 8 are bad; records are written at 1, 3, 6 and 8. It is stopped after 5, of which nobody knows
    yet, and goes on.
    """
    settings = {**STAGE0, "optimizer": optimizer, "save_steps": 0, "kv_weight": 1.0}
    bad = spoil([0, 1, 4], "* nan", of_rank=0)
    names = [f"{optimizer} {kind}" for kind in ("good", "straight", "stopped")]
    for name, setup in zip(names, ("", bad, bad + at_step(4, "os.kill(os.getpid(), signal.SIGTERM)")), strict=True):
        codes, log = start(name, setup=setup, **settings)
        assert codes == [85 if name == names[2] else 0], log[-3000:]
    assert "step 5: loss or gradient is not finite; left out on all ranks (3 so far)" in log
    codes, log = start(names[2], setup=bad, **settings)
    assert codes == [0] and "resumed from step 5 of 8" in log
    check_equal(folder / names[1], folder / names[2])
    found = records(folder / names[1])
    told = [(r["step"], r["bad_steps"]) for r in found if "bad_steps" in r]
    assert told == [(1, 1), (2, 2), (5, 3)]
    assert [r["step"] for r in found] == sorted(r["step"] for r in found)
    # The schedule counts the steps left out, so that it ends where it would have.
    rates = [[(r["step"], r["lr"]) for r in records(folder / name) if "lr" in r] for name in names[:2]]
    assert rates[0] == rates[1]


def test_too_many_in_a_row_are_noticed_where_numbers_are_read(start, folder):
    """Steps 2 and 3 are bad, 4 is not, and after the first step numbers are read at step 5."""
    settings = {**STAGE0, "max_bad_steps": 2, "logging_steps": 5, "save_steps": 0}
    codes, log = start("many", ranks=2, setup=spoil([1, 2], "+ inf", of_rank=1), **settings)
    assert codes == [1, 1] and "Traceback" not in log
    [message] = [line for line in log.splitlines() if line.startswith("kvds: error: ")]
    assert "2 steps in a row had a loss or gradient that is not finite, the last was step 3;" in message
    assert [(r["step"], r["bad_steps"]) for r in records(folder / "many") if "bad_steps" in r] == [(2, 1)]
    dumps = [json.loads(path.read_text()) for path in sorted((folder / "many/bad_steps").iterdir())]
    assert [(dump["step"], dump["rank"], dump["weight_norms_after_step"]) for dump in dumps] == [(3, 0, 5), (3, 1, 5)]
    losses = [[part["metrics"]["loss/task"] for part in dump["micro_batches"]] for dump in dumps]
    assert losses[1] == ["inf", "inf"] and all(isinstance(value, float) for value in losses[0])
    ids = [i for dump in dumps for part in dump["micro_batches"] for i in part["sample_ids"]]
    assert len(set(ids)) == 4
    assert not list((folder / "many").glob("checkpoints/step-*"))


def test_asked_to_stop_after_too_many_in_a_row_it_fails(start, folder):
    setup = spoil([1, 2], "* nan", of_rank=0) + at_step(3, "os.kill(os.getpid(), signal.SIGTERM)")
    codes, log = start("asked", setup=setup, **STAGE0, max_bad_steps=2, logging_steps=8, save_steps=0)
    assert codes == [1] and "Traceback" not in log and "stopping: SIGTERM arrived" in log
    [message] = [line for line in log.splitlines() if line.startswith("kvds: error: ")]
    assert "the last was step 3" in message and not (folder / "asked/preempted").exists()
