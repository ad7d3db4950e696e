"""ZO-AE-DS: the recorded traces, the estimate at a cut against autograd, composition, random numbers, queries, state."""

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zeroth_cases import load

import tare
from tare.core.errors import InputError
from tare.methods.deepzero import DeepZero
from tare.methods.zo_ae_ds import ZOAEDS
from tare.testing.directions import RecordedDirections
from tare.testing.forward_cut import regression
from tare.zeroth.coordinates import Coordinates, CoordinateWise
from tare.zeroth.cut import CGE, RGE, BlackBox
from tare.zeroth.directions import Rademacher
from tare.zeroth.laws import Subspace
from tare.zeroth.log import SeedLog

F64 = torch.float64
cross_entropy = nn.functional.cross_entropy


class Front(nn.Module):
    """The denoiser and encoder of the traces."""

    def __init__(self, denoiser: Tensor, encoder: Tensor):
        super().__init__()
        self.denoiser = nn.Linear(8, 8, bias=False, dtype=F64)
        self.encoder = nn.Linear(8, 6, bias=False, dtype=F64)
        with torch.no_grad():
            self.denoiser.weight.copy_(denoiser)
            self.encoder.weight.copy_(encoder)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x + self.denoiser(x).tanh())


class Case:
    """A trace rebuilt: losses of single samples, or logits, behind the decoder."""

    def __init__(self, name: str):
        self.trace = load(name)
        self.t, self.h = self.trace.tensors, self.trace.hyper
        self.front = Front(self.t["W0.0"], self.t["W0.1"])
        directions = RecordedDirections(dict(enumerate(self.t["u"]))) if "u" in self.t else None
        self.estimator = CGE(self.h["mu"]) if directions is None else RGE(self.h["q"], self.h["mu"], law=directions)

    def logits(self, z: Tensor) -> Tensor:
        return (z @ self.t["Wdec"].T @ self.t["W1"].T).tanh() @ self.t["W2"].T

    def losses(self, z: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.logits(z), y, reduction="none")

    def data(self, step: int) -> tuple[Tensor, Tensor]:
        x = self.t["X"][step]
        return x + self.h["noise_sd"] * self.t["noise"][step], ((x @ self.t["W1"].T).tanh() @ self.t["W2"].T).argmax(1)

    def check(self, step: int, z: Tensor, gradients: list[Tensor] | None) -> None:
        bounds, rows = self.trace.meta["tolerance"], z.shape[0]
        assert z.grad is not None
        assert (z.grad * rows - self.t["a"][step]).abs().max() <= bounds["a"]
        for number, p in enumerate((self.front.denoiser.weight, self.front.encoder.weight)):
            if gradients is not None:
                assert (gradients[number] - self.t[f"G.{number}"][step]).abs().max() <= bounds[f"G.{number}"]
            assert (p - self.t[f"W.{number}"][step]).abs().max() <= bounds[f"W.{number}"]


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("name", ["zoaeds_rge_f64", "zoaeds_cge_f64"])
def test_trace_under_any_optimizer(name: str, together: int) -> None:
    """The wrapper alone, with loss.backward() and torch's Adam."""
    case = Case(name)
    box = BlackBox(case.losses, case.estimator, together=together)
    opt = torch.optim.Adam(case.front.parameters(), lr=case.h["lr"])
    for step in range(case.trace.steps):
        opt.zero_grad()
        x, y = case.data(step)
        z = case.front(x)
        z.retain_grad()
        box(z, y).mean().backward()
        opt.step()
        case.check(step, z, [p.grad for p in case.front.parameters()])
    asked = case.h["q"] + 1 if "rge" in name else 2 * 6 + 1
    assert box.queries == case.trace.steps * 5 * asked
    assert box.calls == case.trace.steps


@pytest.mark.parametrize("name", ["zoaeds_rge_f64", "zoaeds_cge_f64"])
def test_trace_in_the_frame(name: str) -> None:
    case = Case(name)
    box = BlackBox(case.losses, case.estimator)
    opt = ZOAEDS(case.front, case.h["lr"])
    seen: list[Tensor] = []

    def closure() -> Tensor:
        x, y = case.data(opt.steps)
        seen.append(case.front(x))
        seen[-1].retain_grad()
        return box(seen[-1], y).mean()

    for step in range(case.trace.steps):
        opt.step(closure)
        for number, p in enumerate(case.front.parameters()):
            assert (p - case.t[f"W.{number}"][step]).abs().max() <= case.trace.meta["tolerance"][f"W.{number}"]
    assert box.calls == 0, "in the frame directions go by the optimizer's step"


# -- the estimate against autograd -----------------------------------------------------------------------------------------


class Judge(nn.Module):
    def __init__(self, d: int = 6):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = torch.randn(d, 10, generator=generator, dtype=F64) / 2
        self.b = torch.randn(10, 4, generator=generator, dtype=F64)

    def forward(self, z: Tensor) -> Tensor:
        return (z @ self.a).tanh() @ self.b


def _z(rows: int = 5, d: int = 6) -> Tensor:
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(1), dtype=F64, requires_grad=True)


Y = torch.tensor([0, 3, 1, 1, 2])


def _losses(judge: nn.Module):  # type: ignore[no-untyped-def]
    return lambda z: cross_entropy(judge(z), Y, reduction="none")


def test_coordinates_are_autograd_up_to_mu_squared() -> None:
    judge, z = Judge(), _z()
    exact = torch.autograd.grad(_losses(judge)(z).mean(), z)[0]
    errors = {}
    for sides in (True, False):
        for mu in (4e-2, 2e-2):
            found = torch.autograd.grad(BlackBox(_losses(judge), CGE(mu, sides))(z).mean(), z)[0]
            errors[sides, mu] = float((found - exact).abs().max())
    assert errors[True, 4e-2] / errors[True, 2e-2] == pytest.approx(4.0, rel=0.05)
    assert errors[False, 4e-2] / errors[False, 2e-2] == pytest.approx(2.0, rel=0.2)
    assert errors[True, 2e-2] < 2e-4


def test_the_gradient_in_front_is_then_that_of_full_backpropagation() -> None:
    judge, front = (
        Judge(),
        Front(torch.eye(8, dtype=F64), torch.randn(6, 8, generator=torch.Generator().manual_seed(3), dtype=F64)),
    )
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2), dtype=F64)
    _losses(judge)(front(x)).mean().backward()
    exact = [p.grad.clone() for p in front.parameters()]
    front.zero_grad()
    BlackBox(_losses(judge), "cge", mu=1e-4)(front(x)).mean().backward()
    for p, g in zip(front.parameters(), exact, strict=True):
        assert torch.allclose(p.grad, g, atol=1e-7)


@pytest.mark.parametrize("kind", ["rge", "cge"])
def test_the_loss_may_stand_behind_the_box(kind: Any) -> None:
    """A box of logits with a loss in torch: the same estimate as a box of losses, up to mu."""
    judge, z = Judge(), _z()
    inside = torch.autograd.grad(BlackBox(_losses(judge), kind, mu=1e-5)(z).mean(), z)[0]
    behind = torch.autograd.grad(cross_entropy(BlackBox(judge, kind, mu=1e-5)(z), Y), z)[0]
    assert torch.allclose(inside, behind, atol=1e-4)
    assert inside.abs().max() > 1e-2


@pytest.mark.parametrize("q", [1, 4])
def test_random_directions_have_the_mean_and_the_variance_of_the_sphere(q: int) -> None:
    """Mean: the gradient. E||a - g||^2 / ||g||^2 = (d - 1) / q for a linear function, whatever the sample."""
    d, rows = 12, 20_000
    g = torch.randn(d, generator=torch.Generator().manual_seed(4), dtype=F64)
    z = torch.zeros(rows, d, dtype=F64, requires_grad=True)
    found = torch.autograd.grad(BlackBox(lambda z: z @ g, q=q)(z).sum(), z)[0]
    assert (found.mean(0) - g).norm() < 4 * g.norm() * math.sqrt((d - 1) / q / rows)
    assert float((found - g).square().sum(1).mean() / g.square().sum()) == pytest.approx((d - 1) / q, rel=0.05)


def test_directions_of_samples_steps_and_names_differ() -> None:
    z = torch.zeros(3, 5, dtype=F64, requires_grad=True)
    g = torch.ones(5, dtype=F64)

    def found(box: BlackBox) -> Tensor:
        return torch.autograd.grad(box(z).sum(), z)[0]

    box = BlackBox(lambda z: z @ g, q=1)
    first, second = found(box), found(box)
    assert len({tuple(row) for row in [*first.tolist(), *second.tolist()]}) == 6
    assert torch.equal(found(BlackBox(lambda z: z @ g, q=1)), first)
    assert not torch.equal(found(BlackBox(lambda z: z @ g, q=1, seed=1)), first)
    assert not torch.equal(found(BlackBox(lambda z: z @ g, q=1, name="other")), first)


def test_identity_in_front_is_the_coordinate_estimate() -> None:
    """With nothing in front but the weights themselves, it is CGE: DeepZero's step at full density, and its evaluations."""

    def f(w: Tensor) -> Tensor:
        return (w.sin() * torch.arange(1.0, 7.0, dtype=F64)).sum() ** 2

    start = torch.linspace(-1, 1, 6, dtype=F64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    asked: list[Tensor] = []
    box = BlackBox(lambda w: (asked.append(w.clone()), f(w))[1], CGE(5e-3, two_sided=False))  # type: ignore[func-returns-value]
    ZOAEDS([("w", ours)], 1e-3, rule="sgd").step(lambda: box(ours))
    opt = DeepZero([("w", theirs)], 1e-3, mu=5e-3, sparsity=0.0, momentum=0.0, weight_decay=0.0)
    assert isinstance(opt.probe, CoordinateWise)
    assert isinstance(opt.recipe.entries[0][1].law, Coordinates)
    opt.step(lambda: f(theirs))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-13)
    assert len(asked) == opt.evaluated == 7


@pytest.mark.parametrize(
    "estimator", [RGE(9, 1e-3, two_sided=True), RGE(9, 1e-3, sphere=False, law=Rademacher()), CGE(1e-3)]
)
@pytest.mark.parametrize("together", [2, 5, 100])
def test_queries_put_together_are_the_same(estimator: Any, together: int) -> None:
    judge, z = Judge(), _z()

    def losses(z: Tensor, y: Tensor, scale: float) -> Tensor:
        return scale * cross_entropy(judge(z), y, reduction="none")

    one, many = BlackBox(losses, estimator), BlackBox(losses, estimator, together=together)
    a = torch.autograd.grad(one(z, Y, 2.0).sum(), z)[0]
    b = torch.autograd.grad(many(z, Y, 2.0).sum(), z)[0]
    assert torch.allclose(a, b, atol=1e-9)
    assert one.queries == many.queries


# -- composition -----------------------------------------------------------------------------------------------------------


def test_shapes_dtypes_and_answers() -> None:
    for shape in ((2, 3, 4, 4), (3,), (4, 0)):
        z = torch.ones(shape, requires_grad=True)
        BlackBox(lambda z: z.flatten(1).square().sum(1) if z.ndim > 1 else z.square(), "cge")(z).sum().backward()
        assert z.grad is not None
        assert torch.allclose(z.grad, 2 * z.detach(), atol=1e-3)
    z = torch.ones(4, 3, requires_grad=True)
    whole = BlackBox(lambda z: z.square().mean(), "cge", together=3)  # one number for the batch
    whole(z).backward()
    assert torch.allclose(z.grad, z.detach() / 6, atol=1e-3)
    low = torch.ones(4, 3, dtype=torch.bfloat16, requires_grad=True)
    BlackBox(lambda z: z.float().square().sum(1), "cge", mu=0.125)(low).sum().backward()
    assert low.grad.dtype == torch.bfloat16
    assert torch.allclose(low.grad.float(), torch.full((4, 3), 2.0), atol=1e-2)
    same = torch.ones(2, 2, requires_grad=True)
    BlackBox(lambda z: z, "cge")(same).sum().backward()
    assert torch.allclose(same.grad, torch.ones(2, 2), atol=1e-4)


def test_two_boxes_and_white_parts_between() -> None:
    judge = Judge()
    z = _z()
    exact = torch.autograd.grad(cross_entropy(judge(judge(z).tanh() @ torch.ones(4, 6, dtype=F64) / 9), Y), z)[0]
    first, second = BlackBox(judge, "cge", mu=1e-4, name="first"), BlackBox(judge, "cge", mu=1e-4, name="second")
    found = torch.autograd.grad(cross_entropy(second(first(z).tanh() @ torch.ones(4, 6, dtype=F64) / 9), Y), z)[0]
    assert torch.allclose(found, exact, atol=1e-7)


def test_the_box_is_no_part_of_the_model_and_is_not_asked_without_need() -> None:
    judge = nn.Linear(3, 2)
    front = nn.Linear(3, 3)
    model = nn.Sequential(front, BlackBox(judge))
    assert {id(p) for p in model.parameters()} == {id(p) for p in front.parameters()}
    model(torch.ones(4, 3)).sum().backward()
    assert judge.weight.grad is None
    assert model[1].queries == 4 * 21
    with torch.no_grad():
        assert torch.equal(model(torch.ones(4, 3)), judge(front(torch.ones(4, 3))))
    assert model[1].queries == 4 * 22
    assert model[1].calls == 1
    out = model[1](torch.ones(4, 3))
    assert not out.requires_grad


def test_random_numbers_in_the_box_fall_alike_and_leave_no_trace() -> None:
    seen: list[float] = []

    def noisy(z: Tensor) -> Tensor:
        seen.append(float(torch.rand(())))
        return z.sum(1)

    z = torch.ones(4, 3, requires_grad=True)
    torch.manual_seed(0)
    BlackBox(noisy, q=5)(z).sum().backward()
    assert len(seen) == 6
    assert len(set(seen)) == 1
    after = torch.rand(3)
    torch.manual_seed(0)
    torch.rand(())
    assert torch.equal(after, torch.rand(3)), "the generator stands where one call leaves it"


def test_autocast_holds_in_backward() -> None:
    judge, seen = nn.Linear(3, 2), []
    z = torch.ones(4, 3, requires_grad=True)
    box = BlackBox(lambda z: (seen.append(judge(z).dtype), judge(z).float())[1], q=2)  # type: ignore[func-returns-value]
    with torch.autocast("cpu", torch.bfloat16):
        out = box(z)
    out.sum().backward()
    assert set(seen) == {torch.bfloat16}


def test_answers_that_are_not_finite_give_no_gradient() -> None:
    z = torch.tensor([[1.0, 1.0], [0.0, 0.0]], requires_grad=True)
    box = BlackBox(lambda z: torch.log(z + 5e-4).sum(1), "cge", mu=1e-3)
    with pytest.warns(UserWarning, match="not finite"):
        box(z).sum().backward()
    assert torch.allclose(z.grad[0], torch.ones(2), atol=1e-3)
    assert not z.grad[1].any()
    assert box.unanswered == 1


def test_what_is_refused() -> None:
    z = torch.ones(4, 3, requires_grad=True)
    for bad, word in (
        (lambda z: "yes", "str"), (lambda z: z.argmax(1), "int64"), (lambda z: z.sum(0), "returned"), (lambda z: z[:2], "row for each"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=word):
            BlackBox(bad)(z)
    with pytest.raises(InputError, match="number 2 wants one"):
        BlackBox(lambda z, y: (z * y).sum(1))(z, z)
    for options, word in (
        ({"estimator": "spsa"}, "estimator"), ({"q": 0}, "q"), ({"mu": 0.0}, "mu"), ({"together": 0}, "together"), ({"seed": -1}, "seed"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=word):
            BlackBox(lambda z: z, **options)
    with pytest.raises(InputError, match="for each leaf"):
        RGE(law=Subspace(1))
    with pytest.raises(RuntimeError):
        torch.autograd.grad(
            torch.autograd.grad(BlackBox(lambda z: z.sum(1))(z).sum(), z, create_graph=True)[0].sum(), z
        )


def test_a_run_can_be_cut_anywhere() -> None:
    """Under torch's optimizers the box's count is in the model's state dict; in the frame the optimizer's is enough."""
    for frame in (False, True):
        found = []
        for cut in (0, 3):
            problem = regression()
            net = problem.params
            opt = ZOAEDS(net, 1e-2) if frame else torch.optim.SGD(net.parameters(), 1e-2)
            for number in range(6):
                if cut and number == cut:
                    states = copy.deepcopy((net.state_dict(), opt.state_dict()))
                    problem = regression()
                    net = problem.params
                    net.load_state_dict(states[0])
                    if frame:
                        net.box.calls = 77
                    opt = ZOAEDS(net, 1.0, seed=4) if frame else torch.optim.SGD(net.parameters(), 1.0)
                    opt.load_state_dict(states[1])
                if frame:
                    opt.step(lambda problem=problem, number=number: problem.loss(number))
                else:
                    opt.zero_grad()
                    problem.loss(number).backward()
                    opt.step()
            found.append(problem.snapshot())
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_copies_continue_alike() -> None:
    problem = regression()
    opt = ZOAEDS(problem.params, 1e-2)
    opt.step(lambda: problem.loss(0))
    twins = [copy.deepcopy((problem.params, opt)), pickle.loads(pickle.dumps((problem.params, opt)))]
    opt.step(lambda: problem.loss(1))
    from tare.testing.subject import loss_of

    for net, other in twins:
        other.step(lambda net=net: loss_of(net, 1))
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), problem.params.parameters(), strict=True))


# -- the frame -------------------------------------------------------------------------------------------------------------


def test_the_frame_tells_what_is_not_as_it_seems(tmp_path: Any) -> None:
    net = nn.Linear(3, 1)
    with pytest.warns(UserWarning, match="ordinary backpropagation"):
        ZOAEDS(net).step(lambda: net(torch.ones(2, 3)).sum())
    with pytest.warns(UserWarning, match="no gradient"), torch.no_grad():
        ZOAEDS(net).step(lambda: net(torch.ones(2, 3)).detach().sum())
    with SeedLog(tmp_path / "run") as log, pytest.raises(InputError, match="no list of numbers"):
        ZOAEDS(net, on_step=log).step(lambda: net(torch.ones(2, 3)).sum())
    box = BlackBox(lambda z: z.sum(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ZOAEDS(net).step(lambda: box(net(torch.ones(2, 3))).sum())


def test_losses_that_are_not_finite_cost_no_queries() -> None:
    net, box = nn.Linear(3, 1), BlackBox(lambda z: z.sum(1))
    opt = ZOAEDS(net)
    start = net.weight.clone()
    assert math.isnan(opt.step(lambda: box(net(torch.ones(2, 3))).sum() * math.inf))
    assert torch.equal(net.weight, start)
    assert box.queries == 2
    assert opt.skipped == 1


def test_it_is_not_planned_for() -> None:
    with pytest.raises(InputError, match="not known on paper"):
        ZOAEDS(nn.Linear(3, 1, device="meta"))


def test_names() -> None:
    assert tare.ZOAEDS is ZOAEDS
    assert tare.BlackBox is BlackBox


def test_example() -> None:
    """Behind what was trained from answers alone, more is right under noise."""
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parents[2] / "examples" / "defend_black_box.py"
    spec = importlib.util.spec_from_file_location("defend_black_box", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, after = module.main(100)
    assert after > before + 0.04
