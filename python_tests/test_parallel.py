"""Runs on several processes against the run of one."""

import functools

import pytest
import torch
from torch import distributed, nn

from lozo_kernels import LOZO, DivergenceError, MeZO, Parallel, SubZero, ZOMuon

if not distributed.is_available() or not distributed.is_gloo_available():
    pytest.skip("torch.distributed or its gloo backend is missing", allow_module_level=True)

from python_tests.parallel_helpers import EXAMPLES, Batched, Model, batch, finish, logs, start

STEPS = 6
PROBE = {"placement": "probe", "side": "scratch"}
CASES = {
    "in place": {},
    "fused": {"fuse_steps": True, "momentum": 0.9},
    "bf16": {"dtype": torch.bfloat16, "rounding": "stochastic"},
    "one-sided": {"two_sided": False, "weight_decay": 0.1},
    "probe": {**PROBE, "momentum": 0.9},
    "batched": {**PROBE, "evaluation": "batched"},
    "batched, one-sided": {**PROBE, "evaluation": "batched", "two_sided": False},
    "mezo": {"method": MeZO},
    "subzero": {"method": SubZero},
    "muon": {"method": ZOMuon, "momentum": 0.5, **PROBE},
    "skipping": {"poison": 3},
}
SIZES = {1: ["probe", "in place"], 2: list(CASES), 3: ["in place", "fused", "probe", "skipping"], 5: ["fused", "probe"]}


def build(case, parallel=None, directions=1, **more):
    options = {"lr": 3e-2, "eps": 1e-2, "interval": 3, "rank": 2, "seed": 9, **CASES[case], **more}
    method, dtype = options.pop("method", LOZO), options.pop("dtype", torch.float32)
    poison = options.pop("poison", None)
    if method is MeZO:
        del options["rank"], options["interval"]
    kind = Batched if options.get("evaluation") == "batched" else Model
    model = kind(dtype)
    return model, method(model, parallel=parallel, directions=directions, **options), poison


def go_on(model, optimizer, poison, parts=1, part=0, steps=STEPS):
    """Steps on a part of each batch."""
    seen = []
    while optimizer.steps_done < steps:
        step = optimizer.steps_done
        tokens = batch(step).chunk(parts)[part]

        def closure(rows, bad=step == poison and part == parts - 1):
            losses = model(rows)
            return losses * float("nan") if bad else losses

        optimizer.step(closure, tokens)
        info = optimizer.info
        seen.append((info.c.tolist(), info.loss_plus.tolist(), float(info.loss), bool(info.skipped)))
    return seen


def state(model, optimizer):
    found = {name: p.detach().clone() for name, p in model.state_dict().items()}
    optimizer.handle.merge()
    return found | {f"momentum {name}": value.clone() for name, value in optimizer.handle.momentum.items()}


def run(case, mode=None, rank=0, ranks=1, directions=1):
    """(losses, weights, bytes of a step) of a run, in one process without a mode."""
    model, optimizer, poison = build(case, mode and Parallel(mode, check_every=2), directions)
    split = (ranks, rank) if mode == "examples" else (1, 0)
    seen = go_on(model, optimizer, poison, *split)
    traffic = optimizer.parallel.traffic if mode else None
    return seen, state(model, optimizer), traffic and (traffic.sent + traffic.received)


def jobs(ranks):
    for case in SIZES[ranks]:
        yield case, "examples", 1 + (case == "fused")
        if case != "skipping":
            yield case, "directions", max(2, ranks + 1)


def work(rank, ranks, folder):
    """What one process of a healthy run does."""
    found = {job: run(job[0], job[1], rank, ranks, job[2]) for job in jobs(ranks)}
    found["unequal"] = unequal(rank, ranks)
    found["refused"] = refusals(rank, ranks)
    torch.save(found, folder / f"{ranks}-{rank}.pt")


def unequal(rank, ranks):
    """Parts of unequal size by (sum, weight), in several micro-batches, from plain closures."""
    model, optimizer, _ = build("in place", "examples" if ranks > 1 else None)
    cuts = [0, *(3 * r + 2 for r in range(ranks - 1)), EXAMPLES]

    def closure():
        rows = batch(1)[cuts[rank] : cuts[rank + 1]]
        return model(rows).double().sum(), len(rows)

    return [float(optimizer.step(closure)) for _ in range(2)], state(model, optimizer)


def refusals(rank, ranks):
    """The errors of runs whose ranks do not agree, and of divergence: (kind, message) by name."""
    found = {}

    def attempt(name, action):
        try:
            action()
        except (ValueError, RuntimeError) as error:
            found[name] = type(error), str(error)

    if ranks > 1:
        disagreements(rank == ranks - 1, ranks, attempt, found)
        divergences(rank == ranks - 1, attempt, found)
    return found


def disagreements(odd, ranks, attempt, found):
    """What the last rank does otherwise is found out before the first step."""
    attempt("seed", lambda: build("in place", "examples", seed=9 + odd))
    attempt("lr", lambda: build("in place", "examples", lr=1e-3 * (1 + odd)))
    attempt("mode", lambda: build("in place", "directions" if odd else "examples", directions=ranks))
    attempt("interval", lambda: build("in place", "examples", interval=50 + odd))
    model = Model()
    with torch.no_grad():
        model.up.bias[3] += 1e-6 * odd
    attempt("weights", lambda: LOZO(model, parallel="examples"))
    found["usable"] = LOZO(model) is not None
    attempt("directions", lambda: build("in place", "directions", directions=ranks - 1))


def divergences(odd, attempt, found):
    """What the last rank does otherwise later is found out in a step."""
    for name, tensor, check_every in (("sample", "up.weight", 100), ("check", "big.weight", 4)):
        model = Model()
        model.big = nn.Linear(40, 40, bias=False)
        optimizer = LOZO(model, lr=1e-2, parallel=Parallel("examples", check_every=check_every), include=["big.*", "up.*"])

        def diverge(model=model, optimizer=optimizer, tensor=tensor):
            for step in range(9):
                optimizer.step(lambda: model(batch(0)[:2]).mean() + 0 * model.big.weight.sum())
                if step == 5 and odd:
                    with torch.no_grad():
                        model.get_parameter(tensor)[0, 1] += 1e-3

        attempt(name, diverge)
        found[name] = (*found.get(name, ()), optimizer.steps_done)
    model, optimizer, _ = build("in place", "examples")

    def reschedule():
        for step in range(4):
            optimizer.param_groups[0]["lr"] *= 0.9 if step == 1 and odd else 1.0
            optimizer.step(lambda: model(batch(0)[:2]).mean())

    attempt("schedule", reschedule)
    other, behind, _ = build("in place", "examples")
    if odd:
        state = behind.state_dict()
        behind.load_state_dict(state | {"step": 7})
    attempt("step", lambda: behind.step(lambda: other(batch(0)[:2]).mean()))


@pytest.fixture(scope="module", params=[1, 2, 3, 5])
def processes(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    assert finish(start(request.param, folder, work)) == [0] * request.param, logs(folder)
    return [torch.load(folder / f"{request.param}-{rank}.pt", weights_only=False) for rank in range(request.param)]


@functools.cache
def alone(case, directions):
    return run(case, directions=directions)


@pytest.mark.filterwarnings("ignore:.*update skipped:UserWarning")
def test_any_number_of_processes_gives_the_bits_of_one(processes):
    for job in jobs(len(processes)):
        case, _, directions = job
        seen, weights, _ = alone(case, directions)
        assert len({row[2] for row in seen}) > 1 and any(row[3] for row in seen) == (case == "skipping")
        for found in processes:
            for name, p in weights.items():
                together, first = found[job][1][name], processes[0][job][1][name]
                assert torch.equal(together, first), (job, name)
                assert torch.equal(together, p) if "batched" not in case else torch.allclose(together, p, atol=1e-4), (job, name)
            if "batched" not in case:
                assert repr(found[job][0]) == repr(seen), job  # NaN and all
            assert found[job][2] < 1024


def test_unequal_parts(processes):
    ranks = len(processes)
    if ranks == 1:
        return
    losses, weights = unequal(0, 1)
    for found in processes:
        assert found["unequal"][0] == pytest.approx(losses, rel=1e-12)
        for name, p in weights.items():
            assert torch.allclose(found["unequal"][1][name], p, rtol=0, atol=1e-6)
            assert torch.equal(found["unequal"][1][name], processes[0]["unequal"][1][name])


EXPECTED = {
    "seed": (ValueError, "seed (9 on rank 0, 10 on rank"),
    "lr": (ValueError, "0.001"),
    "mode": (ValueError, "parallel (examples on rank 0, directions on rank"),
    "interval": (ValueError, "interval (50 on rank 0, 51"),
    "weights": (ValueError, "weights of 'up.bias'"),
    "directions": (ValueError, "at least one to each"),
    "sample": (DivergenceError, "after step 5, the first"),
    "check": (DivergenceError, "big.weight of rank {odd} differs from the other ranks' after step 7. Everything agreed at step 3"),
    "schedule": (DivergenceError, "of step 1, the first"),
    "step": (DivergenceError, "load the same state"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_ranks_that_do_not_agree(processes, name):
    if len(processes) == 1:
        return
    kind, words = EXPECTED[name]
    messages = set()
    for found in processes:
        error, message, *_ = found["refused"][name]
        assert error is kind and words.format(odd=len(processes) - 1) in message, message
        messages.add(message)
    assert len(messages) == 1 or name == "step"  # which names the step of each
    assert processes[0]["refused"]["usable"]


def test_divergence_stops_at_once(processes):
    for found in processes if len(processes) > 1 else ():
        assert found["refused"]["sample"][2] == 6 and found["refused"]["check"][2] == 8


def test_needs_processes():
    with pytest.raises(RuntimeError, match="init_process_group"):
        LOZO(Model(), parallel="examples")
    model = Model()
    with pytest.raises(RuntimeError, match="torchrun"):
        LOZO(model, parallel=Parallel("directions"))
    LOZO(model)  # the model is as before


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Parallel("weights"), ValueError, "'examples', 'directions'"),
        (lambda: Parallel(check_every=0), ValueError, "check_every"),
        (lambda: Parallel(timeout=0.0), ValueError, "timeout"),
        (lambda: LOZO(Model(), parallel=2), TypeError, "lozo_kernels.Parallel"),
        (lambda: LOZO(Model(), parallel="examples", drive="backward"), ValueError, "leave parallel out"),
    ],
)
def test_bad_arguments(make, error, words):
    with pytest.raises(error, match=words):
        make()
