"""What is TRPO's own in trpo_mujoco.py, against plain definitions, NumPy, torch.distributions; short runs.

The rest of the script is shared with ppo_continuous.py, letter for letter, and tested there.
"""

import copy
import dataclasses
import json
import math
import signal
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import stub_environments
import torch
import torch.nn as nn
from helpers import checkpoint_difference, read_curves, start
from test_ppo_continuous import plain_gae, plain_reward_scaling
from test_ppo_continuous_runs import flags, kill_when, nth_evaluation, refusal
from torch.distributions import Independent, Normal, kl_divergence
from torch.func import functional_call

import ppo_continuous
import trpo_mujoco as trpo

SCRIPT = "trpo_mujoco.py"
STEP_RULES = ("trust-region", "natural-gradient", "line-search")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------- conjugate gradient


def random_system(size: int, condition: float = 100.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric positive definite matrix and a right-hand side, float64."""
    orthogonal, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    eigenvalues = torch.logspace(0, math.log10(condition), size, dtype=torch.float64)
    return (orthogonal * eigenvalues) @ orthogonal.T, torch.randn(size, dtype=torch.float64)


class Matvec:
    """Multiplies with a matrix and counts how often."""

    def __init__(self, matrix: torch.Tensor):
        self.matrix, self.calls = matrix, 0

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.matrix @ vector


@pytest.mark.parametrize("size", [1, 2, 5, 12, 30])
def test_conjugate_gradient_is_exact_after_as_many_iterations_as_rows(size):
    matrix, b = random_system(size, condition=10.0)
    before = b.clone()
    x, squared_residual = trpo.conjugate_gradient(lambda v: matrix @ v, b, size, 0.0)
    np.testing.assert_allclose(x, np.linalg.solve(matrix.numpy(), b.numpy()), rtol=0, atol=1e-9)
    assert squared_residual.shape == () and squared_residual < 1e-16
    assert torch.equal(b, before)  # the caller still needs it


def test_conjugate_gradient_minimises_over_the_krylov_space():
    """Iterate k is the minimiser of x'Ax/2 - b'x over the span of b, Ab, ..., A^(k-1) b: its definition."""
    matrix, b = random_system(8)
    for k in range(1, 8):
        krylov = torch.stack([torch.linalg.matrix_power(matrix, i) @ b for i in range(k)], 1)
        basis, _ = torch.linalg.qr(krylov)
        expected = basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ b)
        matvec = Matvec(matrix)
        x, squared_residual = trpo.conjugate_gradient(matvec, b, k, 0.0)
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-8)
        assert squared_residual.item() == pytest.approx((b - matrix @ x).square().sum().item(), rel=1e-6)
        assert matvec.calls == k


def test_conjugate_gradient_ends_at_its_tolerance():
    """`tolerance` is one of the squared residual, and no product is spent once that has got there."""
    matrix, b = random_system(20)
    residuals = [trpo.conjugate_gradient(lambda v: matrix @ v, b, k, 0.0)[1].item() for k in range(41)]
    assert residuals[0] == pytest.approx(b.square().sum().item())
    for tolerance in (1e3, 1e-1, 1e-4, 1e-10):
        needed = next(k for k, residual in enumerate(residuals) if residual <= tolerance)
        matvec = Matvec(matrix)
        _, squared_residual = trpo.conjugate_gradient(matvec, b, 100, tolerance)
        assert matvec.calls == needed and squared_residual.item() == residuals[needed]
    for exactly in (residuals[3], np.nextafter(residuals[3], 0)):
        matvec = Matvec(matrix)
        trpo.conjugate_gradient(matvec, b, 100, exactly)
        assert (matvec.calls == 3) == (exactly == residuals[3])


def test_conjugate_gradient_of_nothing_is_nothing():
    matvec = Matvec(torch.eye(4))
    for tolerance in (0.0, 1e-10):
        x, squared_residual = trpo.conjugate_gradient(matvec, torch.zeros(4), 10, tolerance)
        assert torch.equal(x, torch.zeros(4)) and squared_residual == 0 and matvec.calls == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conjugate_gradient_far_beyond_convergence(dtype):
    """The residual goes down to rounding, to denormals and to 0, and there is always a quotient of two."""
    cases = [(3, 10, 1, 1), (10, 1000, 1, 1), (10, 10, 1, 1e-15), (4, 10, 1, 1e15)]
    cases += [(6, 10, 1e-6, 1), (10, 100, 1e-3, 1)]  # here the curvature comes to 0 before the residual
    for size, condition, smallest, scale in cases:
        matrix, b = (x.to(dtype) for x in random_system(size, condition))
        matrix, b = matrix * smallest, b * scale
        x, squared_residual = trpo.conjugate_gradient(lambda v, A=matrix: A @ v, b, 2000, 0.0)
        assert x.isfinite().all() and squared_residual.isfinite()
        expected = torch.linalg.solve(matrix.double(), b.double())
        assert (x - expected).norm() <= 10 * torch.finfo(dtype).eps * condition * expected.norm()


def test_conjugate_gradient_keeps_what_it_has_when_a_product_is_nan():
    matrix, b = random_system(6)
    for good in range(4):
        left = iter(range(good))
        x, _ = trpo.conjugate_gradient(
            lambda v, left=left: matrix @ v if next(left, None) is not None else v * math.nan, b, 6, 0.0
        )
        expected, _ = trpo.conjugate_gradient(lambda v: matrix @ v, b, good, 0.0)
        assert torch.equal(x, expected)


# --------------------------------------------------------------------- the policy in plain definitions


def make_agent(dtype: torch.dtype = torch.float64) -> trpo.Agent:
    """3 observations, 2 actions, an actor so small (P = 28) that its Fisher matrix can be written out."""
    agent = trpo.Agent(3, np.full(2, -1.0), np.full(2, 1.0), log_std=-0.5)
    agent.actor = trpo.mlp([3, 4, 2], output_gain=1.0)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return agent.to(dtype)


def policy_parameters(agent: trpo.Agent) -> list[torch.Tensor]:
    return [*agent.actor.parameters(), agent.log_std]


def flat(agent: trpo.Agent) -> torch.Tensor:
    """The parameters of the policy (P,), copied."""
    return torch.cat([p.detach().flatten() for p in policy_parameters(agent)])


def as_bytes(tensors) -> list[bytes]:
    return [x.detach().numpy().tobytes() for x in tensors]


def policy_at(agent: trpo.Agent, vector: torch.Tensor, observations: torch.Tensor) -> Independent:
    """The policy with the parameters `vector` (P,), as torch.distributions has it; differentiable."""
    *weights, log_std = vector.split([p.numel() for p in policy_parameters(agent)])
    named = {name: w.view_as(p) for (name, p), w in zip(agent.actor.named_parameters(), weights)}
    return Independent(Normal(functional_call(agent.actor, named, (observations,)), log_std.exp()), 1)


def mean_kl(agent, old: torch.Tensor, new: torch.Tensor, observations: torch.Tensor) -> torch.Tensor:
    return kl_divergence(policy_at(agent, old, observations), policy_at(agent, new, observations)).mean()


def surrogate(agent, old: torch.Tensor, new: torch.Tensor, batch: tuple) -> torch.Tensor:
    observations, actions, advantages = batch
    log_prob = policy_at(agent, new, observations).log_prob(actions)
    return ((log_prob - policy_at(agent, old, observations).log_prob(actions)).exp() * advantages).mean()


def policy_gradient(agent, batch: tuple) -> torch.Tensor:
    """E[A grad log pi] (P,)."""
    observations, actions, advantages = batch
    vector = flat(agent).requires_grad_()
    log_probs = policy_at(agent, vector, observations).log_prob(actions)
    return torch.autograd.grad(log_probs @ advantages / len(advantages), vector)[0]


def fisher_matrix(agent, observations: torch.Tensor) -> torch.Tensor:
    """F (P, P) of a Gaussian: J' J / sigma^2 for the means, whose Jacobian is J, and 2 for each log_std."""
    vector = flat(agent)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: policy_at(agent, v, observations).base_dist.loc, vector
    )  # (B, A, P)
    weights = (-2 * agent.log_std.detach()).exp() / len(observations)
    matrix = torch.einsum("bap,a,baq->pq", jacobian, weights, jacobian)
    dimensions = torch.arange(len(vector) - len(agent.log_std), len(vector))
    matrix[dimensions, dimensions] += 2
    return matrix


def make_batch(agent: trpo.Agent, B: int = 24) -> tuple[torch.Tensor, ...]:
    """Observations, actions of the policy, advantages."""
    dtype = agent.log_std.dtype
    observations = torch.randn(B, 3, dtype=dtype)
    actions = policy_at(agent, flat(agent), observations).sample()
    advantages = torch.randn(B, dtype=dtype)
    return observations, actions, (advantages - advantages.mean()) / advantages.std()


def step_args(**changes) -> trpo.Args:
    return trpo.Args(**{"compile": False} | changes)


def take_step(agent: trpo.Agent, batch: tuple, args: trpo.Args) -> dict[str, float]:
    """One step of the policy, with the metrics as numbers.

    The radius is given apart, because training lowers it; the one in the arguments must not matter.
    """
    others = dataclasses.replace(args, max_kl=1e3)
    metrics = trpo.policy_step(agent, trpo.Batch(*batch, returns=None), args.max_kl, others)
    return {name: float(value) for name, value in metrics.items()}


# ------------------------------------------------------------------- surrogate and Fisher-vector product


def test_surrogate_is_the_mean_of_ratio_times_advantage():
    log_probs, old_log_probs, advantages = torch.randn(3, 16, dtype=torch.float64)
    ours = trpo.surrogate_objective(log_probs, old_log_probs, advantages)
    plain = [math.exp(n - o) * a for n, o, a in zip(log_probs, old_log_probs, advantages)]
    assert ours.shape == () and ours.item() == pytest.approx(sum(plain).item() / 16, abs=1e-12)
    log_probs.requires_grad_()
    assert torch.autograd.gradcheck(trpo.surrogate_objective, (log_probs, old_log_probs, advantages))


def test_gradient_of_the_surrogate_at_the_old_policy_is_the_policy_gradient():
    agent = make_agent()
    observations, actions, advantages = batch = make_batch(agent)
    log_probs = trpo.gaussian_log_prob(actions, agent.actor(observations), agent.log_std)
    objective = trpo.surrogate_objective(log_probs, log_probs.detach(), advantages)
    gradients = torch.autograd.grad(objective, policy_parameters(agent))
    ours = torch.cat([x.flatten() for x in gradients])
    torch.testing.assert_close(ours, policy_gradient(agent, batch), rtol=1e-9, atol=1e-12)
    # And by finite differences of the surrogate of torch.distributions.
    old, steps = flat(agent), 1e-5 * torch.eye(len(ours), dtype=torch.float64)
    with torch.no_grad():
        slopes = [
            (surrogate(agent, old, old + e, batch) - surrogate(agent, old, old - e, batch)) / 2e-5
            for e in steps
        ]
    np.testing.assert_allclose(ours, slopes, rtol=0, atol=1e-8)


def damped_fisher(agent: trpo.Agent, observations: torch.Tensor, damping: float) -> torch.Tensor:
    """The matrix (P, P) that the script multiplies with, column by column."""
    parameters = policy_parameters(agent)
    with torch.no_grad():
        old_means, old_log_std = agent.actor(observations), agent.log_std.clone()
    kl = trpo.gaussian_kl(old_means, old_log_std, agent.actor(observations), agent.log_std).mean()
    gradients = torch.autograd.grad(kl, parameters, create_graph=True)
    kl_gradient = torch.cat([x.flatten() for x in gradients])
    columns = torch.eye(len(kl_gradient), dtype=torch.float64)
    return torch.stack([trpo.fisher_vector_product(kl_gradient, parameters, v, damping) for v in columns], 1)


@pytest.mark.parametrize("damping", [0.0, 0.1, 3.0])
def test_fisher_vector_product_is_the_hessian_of_the_kl(damping):
    agent = make_agent()
    observations, _, _ = make_batch(agent)
    ours, old = damped_fisher(agent, observations, damping), flat(agent)
    assert not ours.requires_grad and ours.shape == (28, 28)
    hessian = torch.autograd.functional.hessian(lambda v: mean_kl(agent, old, v, observations), old)
    identity = torch.eye(28, dtype=torch.float64)
    torch.testing.assert_close(ours, hessian + damping * identity, rtol=1e-9, atol=1e-12)
    closed_form = fisher_matrix(agent, observations) + damping * identity
    torch.testing.assert_close(ours, closed_form, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours, ours.T, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(ours).min() >= damping - 1e-12


def test_fisher_matrix_is_the_covariance_of_the_score():
    """Its other definition, E[grad log pi grad log pi'], over many samples; this tests the tests' own F."""
    agent = make_agent()
    observations = torch.randn(4, 3, dtype=torch.float64)
    samples = observations.repeat(10_000, 1)
    actions = policy_at(agent, flat(agent), samples).sample()

    def log_prob(vector, observation, action):
        return policy_at(agent, vector, observation).log_prob(action)

    scores = torch.func.vmap(torch.func.grad(log_prob), (None, 0, 0))(flat(agent), samples, actions)
    error = scores.T @ scores / len(scores) - fisher_matrix(agent, observations)
    assert error.norm() < 0.05 * fisher_matrix(agent, observations).norm()


# ------------------------------------------------------------------------------------------ line search


class Toy:
    """L and KL as functions of the fraction of the full step that was taken, in two parameters."""

    def __init__(self, surrogate, kl, offset: float = 0.0):
        self.parameters = [nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([[4.0]]))]
        self.step = torch.tensor([8.0, 16.0, -32.0])
        self.surrogate, self.kl, self.offset, self.visited = surrogate, kl, offset, []

    def evaluate(self) -> tuple[torch.Tensor, torch.Tensor]:
        old = torch.tensor([1.0, -2.0, 4.0])
        fractions = (torch.cat([p.flatten() for p in self.parameters]) - old) / self.step
        assert fractions.min() == fractions.max()  # every parameter moved by its own part of the step
        self.visited.append(fractions[0].item())
        numbers = self.offset + self.surrogate(self.visited[-1]), self.kl(self.visited[-1])
        return tuple(torch.tensor(x, dtype=torch.float64) for x in numbers)

    def search(self, max_kl: float = 0.1, backtrack_coef: float = 0.5, max_backtracks: int = 5):
        settings = max_kl, backtrack_coef, max_backtracks
        return trpo.line_search(self.evaluate, self.parameters, self.step, *settings)


TOYS = {  # L(x) - L(0), KL(x), how often the step is shortened; None: the search fails
    "full step": (lambda x: x, lambda x: 0.05, 0),
    "KL of exactly delta": (lambda x: x, lambda x: 0.1, 0),
    "KL too high at first": (lambda x: x, lambda x: x**2, 2),
    "L falls at first": (lambda x: x * (0.3 - x), lambda x: 0.0, 2),
    "first the KL, then L": (lambda x: x * (0.1 - x), lambda x: 0.3 * x, 4),
    "first L, then the KL": (lambda x: x * (0.3 - x), lambda x: x, 4),
    "last chance": (lambda x: x * (0.04 - x), lambda x: 0.0, 5),
    "one too many": (lambda x: x * (0.03 - x), lambda x: 0.0, None),
    "KL fine, L falls": (lambda x: -x, lambda x: 0.0, None),
    "KL fine, L as it was": (lambda x: 0.0, lambda x: 0.0, None),
    "L grows, KL too high": (lambda x: x, lambda x: 1.0, None),
    "never both": (lambda x: x * (x - 0.4), lambda x: x / 3, None),
    "NaN in L": (lambda x: math.nan if x else 0.0, lambda x: 0.0, None),
    "NaN in L before": (lambda x: x or math.nan, lambda x: 0.0, None),
    "NaN in KL": (lambda x: x, lambda x: math.nan, None),
    "NaN in L at first": (lambda x: math.nan if x > 0.3 else x, lambda x: 0.0, 2),
    "NaN in KL at first": (lambda x: x, lambda x: math.nan if x > 0.6 else 0.0, 1),
    "infinite KL at first": (lambda x: x, lambda x: math.inf if x > 0.6 else 0.0, 1),
}


@pytest.mark.parametrize("offset", [-3.0, 5.0])  # L grows from what it was, which may have any sign
@pytest.mark.parametrize("name", TOYS)
def test_line_search_shortens_as_often_as_needed(name, offset):
    *functions, needed = TOYS[name]
    toy = Toy(*functions, offset)
    before = as_bytes(toy.parameters)
    accepted, backtracks = toy.search()
    assert accepted == (needed is not None) and backtracks == (5 if needed is None else needed)
    assert toy.visited == [0.0] + [0.5**k for k in range(backtracks + 1)]
    if accepted:
        moved = torch.cat([p.detach().flatten() for p in toy.parameters])
        assert torch.equal(moved, torch.tensor([1.0, -2.0, 4.0]) + 0.5**needed * toy.step)
    else:
        assert as_bytes(toy.parameters) == before


@pytest.mark.parametrize("max_backtracks", [1, 2, 7])
def test_max_backtracks_counts_the_shortenings(max_backtracks):
    for needed in range(9):
        toy = Toy(lambda x: x, lambda x, limit=0.25**needed: 0.0 if x <= limit else 1.0)
        accepted, backtracks = toy.search(backtrack_coef=0.25, max_backtracks=max_backtracks)
        assert (accepted, backtracks) == (needed <= max_backtracks, min(needed, max_backtracks))
        assert len(toy.visited) == 2 + backtracks


def test_infinite_limit_asks_for_growth_only():
    assert Toy(lambda x: x * (0.3 - x), lambda x: 1e9).search(max_kl=math.inf) == (True, 2)


@pytest.mark.parametrize("shapes", [[(7,)], [(3,), (2, 2)], [(), (1, 3), (3,)]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_failed_line_search_restores_every_bit(shapes, dtype):
    """Values that old + step - step would not bring back: denormals, -0.0, the largest and the smallest."""
    limits = torch.finfo(dtype)
    awkward = [-0.0, limits.smallest_normal / 8, limits.max, limits.tiny, 1 / 3, -limits.max, 1e-30]
    values = torch.tensor(awkward, dtype=dtype).split([math.prod(shape) for shape in shapes])
    parameters = [nn.Parameter(x.reshape(shape).clone()) for x, shape in zip(values, shapes)]
    before = as_bytes(parameters)
    storage = [p.data_ptr() for p in parameters]

    def evaluate_step():
        return -torch.ones(()), torch.zeros(())

    step = torch.tensor([1e3, -1e-3, 1e38, 1.0, -5.0, math.nan, 1e30], dtype=dtype)
    assert trpo.line_search(evaluate_step, parameters, step, 0.01, 0.8, 3) == (False, 3)
    assert as_bytes(parameters) == before
    assert [p.data_ptr() for p in parameters] == storage and all(p.requires_grad for p in parameters)


# ------------------------------------------------------------------------------------- the policy's step


@pytest.mark.parametrize("damping", [0.03, 0.5])
@pytest.mark.parametrize("max_kl", [0.01, 0.2])
def test_full_step_solves_the_quadratic_model(damping, max_kl, monkeypatch):
    """sqrt(2 delta / x'Ax) x with A x = g and A = F + damping I, by a direct solve; log_std is part of it."""
    monkeypatch.setattr(trpo, "CG_TOLERANCE", 0.0)
    agent = make_agent()
    batch, old = make_batch(agent), flat(agent)
    matrix = fisher_matrix(agent, batch[0]) + damping * torch.eye(28, dtype=torch.float64)
    x = torch.linalg.solve(matrix, policy_gradient(agent, batch))
    expected = (2 * max_kl / (x @ matrix @ x)).sqrt() * x
    args = step_args(step_rule="natural-gradient", max_kl=max_kl, cg_damping=damping, cg_iterations=60)
    metrics = take_step(agent, batch, args)
    torch.testing.assert_close(flat(agent) - old, expected, rtol=1e-6, atol=1e-9)
    assert expected[-2:].abs().min() > 1e-3  # log_std moves, or it would not show
    assert metrics["cg_residual"] < 1e-20


@pytest.mark.parametrize("cg_iterations", [1, 2, 4])
def test_full_step_has_its_length_before_conjugate_gradient_has_converged(cg_iterations):
    agent = make_agent()
    batch, old = make_batch(agent), flat(agent)
    matrix = fisher_matrix(agent, batch[0]) + 0.1 * torch.eye(28, dtype=torch.float64)
    gradient = policy_gradient(agent, batch)
    args = step_args(step_rule="natural-gradient", max_kl=0.05, cg_iterations=cg_iterations)
    metrics = take_step(agent, batch, args)
    step = flat(agent) - old
    assert (step @ matrix @ step).item() == pytest.approx(2 * 0.05, rel=1e-9)
    assert metrics["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-9)
    x, _ = trpo.conjugate_gradient(lambda v: matrix @ v, gradient, cg_iterations, 0.0)
    torch.testing.assert_close(step / step.norm(), x / x.norm(), rtol=1e-7, atol=1e-9)
    residual = (gradient - matrix @ x).square().sum().item()
    assert metrics["cg_residual"] == pytest.approx(residual, rel=1e-6)


def test_conjugate_gradient_of_the_step_ends_at_the_tolerance(monkeypatch):
    products, original = [], trpo.fisher_vector_product
    monkeypatch.setattr(trpo, "fisher_vector_product", lambda *x: products.append(x) or original(*x))
    metrics, counts = [], []
    for cg_iterations in (2, 1000):
        products.clear()
        agent = make_agent()
        args = step_args(cg_iterations=cg_iterations, cg_damping=0.25)
        metrics.append(take_step(agent, make_batch(agent), args))
        counts.append(len(products))
        assert all(call[-1] == 0.25 for call in products)
    assert counts[0] == 2 + 1 and counts[1] < 100  # one more product gives the length of the step
    residuals = [m["cg_residual"] / m["grad_norm"] ** 2 for m in metrics]
    assert residuals[1] <= 1e-10 < residuals[0]


@pytest.mark.parametrize("scale", [2.0**-13, 2.0**13])  # powers of 2 round alike
def test_scale_of_the_advantages_does_not_matter(scale, monkeypatch):
    """Neither for the step nor for the iterations that it takes: the tolerance is relative."""
    products, original = [], trpo.fisher_vector_product
    monkeypatch.setattr(trpo, "fisher_vector_product", lambda *x: products.append(x) or original(*x))
    agents, counts = [make_agent()], []
    agents.append(copy.deepcopy(agents[0]))
    observations, actions, advantages = make_batch(agents[0])
    for agent, factor in zip(agents, (1.0, scale)):
        products.clear()
        take_step(agent, (observations, actions, factor * advantages), step_args(cg_iterations=100))
        counts.append(len(products))
    assert counts[0] == counts[1] < 101
    torch.testing.assert_close(flat(agents[1]), flat(agents[0]), rtol=1e-12, atol=1e-12)


def expected_search(agent, old, batch, full_step, args: trpo.Args, limit: float) -> int | None:
    """How often `full_step` must be shortened, by torch.distributions; None where the search fails."""
    for k in range(args.max_backtracks + 1):
        new = old + args.backtrack_coef**k * full_step
        if surrogate(agent, old, new, batch) > surrogate(agent, old, old, batch):
            if mean_kl(agent, old, new, batch[0]) <= limit:
                return k
    return None


@pytest.mark.parametrize("step_rule", STEP_RULES)
@torch.no_grad()
def test_steps_over_many_batches(step_rule):
    """Where each rule ends, and what it says about it, over small batches and large steps.

    The full step of the trust region is that of the natural gradient, tested above.
    """
    changes = {"max_kl": 0.5, "cg_iterations": 8, "backtrack_coef": 0.7, "max_backtracks": 6}
    args = step_args(step_rule=step_rule, initial_step_size=20.0, **changes)
    shortened, too_far = set(), 0
    limit = 0.5 if step_rule == "trust-region" else math.inf
    for _ in range(25):
        agent = make_agent()
        batch, old = make_batch(agent, 12), flat(agent)
        with torch.enable_grad():
            gradient = policy_gradient(agent, batch)
            if step_rule == "line-search":
                full_step = 20.0 * gradient
            else:
                other = copy.deepcopy(agent)
                take_step(other, batch, dataclasses.replace(args, step_rule="natural-gradient"))
                full_step = flat(other) - old
            metrics = take_step(agent, batch, args)
        new, needed = flat(agent), 0
        if step_rule != "natural-gradient":
            needed = expected_search(agent, old, batch, full_step, args, limit)
        kl = mean_kl(agent, old, new, batch[0]).item()
        grown = (surrogate(agent, old, new, batch) - surrogate(agent, old, old, batch)).item()
        if needed is None:
            assert as_bytes([new]) == as_bytes([old])
            assert metrics["step_accepted"] == 0 and metrics["backtracks"] == 6
        else:
            assert metrics["step_accepted"] == 1 and metrics["backtracks"] == needed
            torch.testing.assert_close(new - old, 0.7**needed * full_step, rtol=1e-9, atol=1e-12)
            shortened.add(needed)
            if step_rule == "trust-region":
                assert kl <= 0.5 and grown > 0
        too_far += mean_kl(agent, old, old + full_step, batch[0]) > 0.5
        expected = {
            "kl": kl,
            "improvement": grown,
            "expected_improvement": (gradient @ (new - old)).item(),
            "grad_norm": gradient.norm().item(),
        }
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-7, abs=1e-10), name
        assert metrics["cg_residual"] == 0 if step_rule == "line-search" else metrics["cg_residual"] > 0
        assert all(math.isfinite(value) for value in metrics.values())
    assert too_far > 3  # the limit matters
    assert len(shortened) > 1 or step_rule == "natural-gradient"


def test_steps_of_the_whole_network_in_single_precision():
    """As a run takes them: 64 x 64 units, several in a row."""
    agent = trpo.Agent(5, np.full(3, -1.0), np.full(3, 1.0), log_std=-0.5)
    for _ in range(6):
        observations, advantages = torch.randn(256, 5), torch.randn(256)
        old = flat(agent).double()
        actions = policy_at(agent, flat(agent), observations).sample()
        metrics = take_step(agent, (observations, actions, advantages), step_args(max_kl=0.01))
        batch, new = [x.double() for x in (observations, actions, advantages)], flat(agent).double()
        assert metrics["step_accepted"] == 1 and not torch.equal(new[-3:], old[-3:])
        kl = mean_kl(agent, old, new, batch[0]).item()
        assert 0.001 < kl <= 0.01 + 1e-6 and metrics["kl"] == pytest.approx(kl, abs=1e-6)
        grown = (surrogate(agent, old, new, batch) - surrogate(agent, old, old, batch)).item()
        assert grown > 0.01 and metrics["improvement"] == pytest.approx(grown, abs=1e-5)
        # The step is small enough for the first order to tell most of it.
        assert 0.5 < grown / metrics["expected_improvement"] < 1.1


def test_step_leaves_all_but_the_policy_alone():
    agent = make_agent(torch.float32)
    batch = make_batch(agent)
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    inputs = as_bytes(batch)
    assert take_step(agent, batch, step_args())["step_accepted"] == 1
    changed = {name for name, x in agent.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {"log_std"} | {f"actor.{name}" for name, _ in agent.actor.named_parameters()}
    assert all(p.grad is None and p.requires_grad and p.is_leaf for p in agent.parameters())
    assert as_bytes(batch) == inputs


@pytest.mark.parametrize("cause", ["KL too high", "L falls", "NaN advantages", "NaN observations"])
def test_failed_step_leaves_the_policy_bit_for_bit_and_says_so(cause, monkeypatch):
    agent = make_agent(torch.float32)
    observations, actions, advantages = make_batch(agent)
    with torch.no_grad():
        agent.actor[0].weight[0, 0], agent.log_std[0] = -0.0, 1e-41
    kl, objective = trpo.gaussian_kl, trpo.surrogate_objective
    if cause == "KL too high":
        monkeypatch.setattr(trpo, "gaussian_kl", lambda *x: kl(*x) + 1)  # the gradient stays the same
    elif cause == "L falls":  # the gradient points uphill, and all but the old policy is worse than it
        monkeypatch.setattr(trpo, "surrogate_objective", lambda *x: objective(*x) - 9 * (x[0] - x[1]).norm())
    elif cause == "NaN advantages":
        advantages[3] = math.nan
    else:
        observations[3] = math.nan
    before = as_bytes(policy_parameters(agent))
    metrics = take_step(agent, (observations, actions, advantages), step_args(max_backtracks=7))
    assert as_bytes(policy_parameters(agent)) == before
    assert metrics["step_accepted"] == 0 and metrics["backtracks"] == 7
    if cause in ("KL too high", "L falls"):
        assert metrics["improvement"] == metrics["expected_improvement"] == 0
        assert metrics["kl"] == (cause == "KL too high")


def test_natural_gradient_is_without_a_line_search(monkeypatch):
    """It takes the step although L falls and the KL is too high; the other two, given the same, do not."""
    kl, objective = trpo.gaussian_kl, trpo.surrogate_objective
    monkeypatch.setattr(trpo, "gaussian_kl", lambda *x: kl(*x) + 1)
    monkeypatch.setattr(trpo, "surrogate_objective", lambda *x: objective(*x) - 9 * (x[0] - x[1]).norm())
    for step_rule in STEP_RULES:
        agent = make_agent()
        batch, old = make_batch(agent), flat(agent)
        metrics = take_step(agent, batch, step_args(step_rule=step_rule))
        taken = step_rule == "natural-gradient"
        assert torch.equal(flat(agent), old) != taken and metrics["step_accepted"] == taken
        assert metrics["backtracks"] == (0 if taken else 10)


@pytest.mark.parametrize("step_rule", STEP_RULES)
def test_no_advantage_moves_nothing(step_rule):
    agent = make_agent(torch.float32)
    observations, actions, advantages = make_batch(agent)
    old = flat(agent)
    args = step_args(step_rule=step_rule)
    metrics = take_step(agent, (observations, actions, torch.zeros_like(advantages)), args)
    assert torch.equal(flat(agent), old)
    for name in ("kl", "improvement", "expected_improvement", "grad_norm", "cg_residual"):
        assert metrics[name] == 0, name
    assert metrics["step_accepted"] == (step_rule == "natural-gradient")


# -------------------------------------------------------------------------------------------- the critic


def test_update_of_the_critic_is_the_textbook_step():
    # In float64, so that the steps do not drift apart. What is left is the bias correction of Adam, which
    # stays in float32: 1 - 0.999^step is off by 1e-4 of itself at most, a step of 1e-3 by 5e-8.
    agent, observations, returns = make_agent(), *torch.randn(2, 32, 3, dtype=torch.float64)
    returns, policy = returns[:, 0] * 3 + 1, flat(agent)
    reference = copy.deepcopy(agent)
    update = trpo.make_update(agent, trpo.Adam(agent.critic.parameters(), 1e-3), step_args())
    optimizer = torch.optim.Adam(reference.critic.parameters(), 1e-3)
    for indices in torch.randperm(32).view(4, 8):
        loss = update(indices, trpo.Batch(observations, None, None, returns))
        values = reference.critic(observations[indices])[:, 0]
        expected = 0.5 * nn.functional.mse_loss(values, returns[indices])
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and not loss.requires_grad
        for p, q in zip(agent.critic.parameters(), reference.critic.parameters()):
            torch.testing.assert_close(p, q, rtol=0, atol=3e-7)
    assert torch.equal(flat(agent), policy)


def test_compiled_update_is_the_eager_one(capsys):
    agents = make_agent(torch.float32), make_agent(torch.float32)
    agents[1].load_state_dict(agents[0].state_dict())
    batch = trpo.Batch(torch.randn(32, 3), torch.randn(32, 2), torch.randn(32), torch.randn(32))
    optimizers = [trpo.Adam(agent.critic.parameters(), 1e-2) for agent in agents]
    updates = [
        trpo.make_update(agent, optimizer, step_args(compile=compiled))
        for agent, optimizer, compiled in zip(agents, optimizers, (True, False))
    ]
    assert updates[0] is not updates[1] and hasattr(updates[0], "_torchdynamo_orig_callable")
    before = agents[0].critic[0].weight.detach().clone()
    torch._dynamo.utils.counters.clear()
    for epoch in range(3):
        for optimizer in optimizers:
            optimizer.learning_rate.fill_(1e-2 / (1 + epoch))
        for indices in torch.randperm(32).view(2, 16):
            compiled, eager = (update(indices, batch) for update in updates)
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    if "does not work here" in capsys.readouterr().out:
        pytest.skip("no compiler")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # for all learning rates
    assert not torch.allclose(agents[0].critic[0].weight, before, atol=1e-3)
    for p, q in zip(agents[0].parameters(), agents[1].parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_kl": 0.0}, "max_kl must lie in (0, inf), got 0.0"),
        ({"max_kl": math.nan}, "max_kl must lie in (0, inf), got nan"),
        ({"initial_step_size": -1.0}, "initial_step_size must lie in (0, inf)"),
        ({"learning_rate": 0.0}, "learning_rate must lie in (0, inf)"),
        ({"cg_iterations": 0}, "cg_iterations must lie in [1, inf)"),
        ({"cg_damping": -0.1}, "cg_damping must lie in [0, inf)"),
        ({"cg_damping": math.nan}, "cg_damping must lie in [0, inf)"),
        ({"max_backtracks": 0}, "max_backtracks must lie in [1, inf)"),
        ({"backtrack_coef": 0.0}, "backtrack_coef must lie in (0, 1), got 0.0"),
        ({"backtrack_coef": 1.0}, "backtrack_coef must lie in (0, 1), got 1.0"),
        ({"backtrack_coef": math.nan}, "backtrack_coef must lie in (0, 1), got nan"),
        ({"critic_epochs": 0}, "critic_epochs must lie in [1, inf)"),
        ({"num_minibatches": 7}, "num_minibatches = 7 must divide"),
        ({"num_minibatches": 0}, "num_minibatches must lie in [1, inf)"),
        ({"num_envs": 1, "num_steps": 1, "num_minibatches": 1}, "raise num_steps"),
        ({"num_steps": 0}, "num_steps must lie in [1, inf)"),
        ({"gamma": 1.01}, "gamma must lie in [0, 1]"),
        ({"gae_lambda": math.nan}, "gae_lambda must lie in [0, 1]"),
        ({"eval_interval": -1}, "eval_interval must lie in [0, inf)"),
        ({"seed": 2**32}, "seed must lie in"),
        ({"log_std_init": math.inf}, "log_std_init must lie in (-inf, inf), got inf"),
        ({"resume": "a", "evaluate": "b"}, "resume, evaluate and run_name exclude each other"),
    ],
    ids=lambda x: "-".join(f"{name}-{value}" for name, value in x.items()) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError) as error:
        trpo.Args(**changes)
    assert message in str(error.value)


def test_arguments_at_the_edge_are_fine():
    trpo.Args(cg_damping=0.0, backtrack_coef=0.999, max_backtracks=1, eval_interval=0, gamma=1.0, seed=0)
    one = {"num_envs": 1, "num_steps": 1, "num_minibatches": 1}
    assert trpo.Args(**one, norm_adv=False).batch_size == 1
    assert trpo.Args(num_envs=3, num_steps=5, num_minibatches=15).batch_size == 15


def test_command_line(capsys):
    args = trpo.parse_args("--step-rule natural-gradient --max-kl 0.02 --no-norm-adv".split())
    assert (args.step_rule, args.max_kl, args.norm_adv) == ("natural-gradient", 0.02, False)
    for words in ("--step-rule steepest", "--backtrack-coef 1.0"):
        with pytest.raises(SystemExit) as stopped:
            trpo.parse_args(words.split())
        printed = capsys.readouterr().err + str(stopped.value.code)
        assert stopped.value.code not in (0, None)
        assert words.split()[0][2:].replace("-", "_") in printed.replace("-", "_")


# ------------------------------------------------------------------------------------- what training does


@pytest.mark.parametrize("norm_adv", [True, False])
def test_each_step_is_given_what_the_definitions_say(norm_adv, tmp_path, monkeypatch):
    """Two iterations, computed anew from what the environments saw; the steps themselves move nothing.

    The policy comes before the critic, so that advantages and targets are those of the old value function.
    """
    policy_calls, critic_calls, metrics = [], [], {"kl": 0.25, "improvement": 2.0}

    def policy_step(agent, batch, *settings):
        assert len(critic_calls) == 6 * len(policy_calls)
        policy_calls.append((agent, trpo.Batch(*(x.clone() for x in batch)), *settings))
        return dict(metrics)

    def make_update(agent, optimizer, args):
        assert [*map(id, optimizer.parameters)] == [*map(id, agent.critic.parameters())]

        def update(indices, batch):
            inputs = indices, batch.observations, batch.returns
            critic_calls.append((optimizer.learning_rate.item(), *[x.clone() for x in inputs]))
            return torch.tensor(float(len(critic_calls)))

        return update

    monkeypatch.setattr(trpo, "policy_step", policy_step)
    monkeypatch.setattr(trpo, "make_update", make_update)
    stub_environments.LOG.clear()
    changes = {"env_id": "Stub/NoisySeeded-v0", "num_envs": 2, "num_steps": 9, "num_minibatches": 3}
    changes |= {"critic_epochs": 2, "eval_interval": 0, "gamma": 0.9, "gae_lambda": 0.8, "seed": 1}
    args = step_args(**changes, total_timesteps=36, norm_adv=norm_adv, runs=str(tmp_path))
    curves = read_curves(trpo.main(args))

    seen = [stub_environments.LOG[i::2] for i in range(2)]  # the environments are stepped in turn
    _, raw, env_actions, rewards, raw_next, terminated, truncated = (
        np.array([[steps[t][field] for steps in seen] for t in range(18)]) for field in range(7)
    )
    done, history = terminated | truncated, raw[:9].reshape(-1, 3)  # in both cases that of the first
    mean, std = history.mean(0), np.sqrt(history.var(0) + 1e-8)
    assert terminated.any() and truncated.any() and len(policy_calls) == 2 and len(critic_calls) == 12
    returns_state = {"running": np.zeros(2), "seen": []}
    for iteration, (agent, batch, max_kl, given_args) in enumerate(policy_calls):
        rows = slice(9 * iteration, 9 * iteration + 9)
        normal, normal_next = (
            torch.from_numpy(np.clip((x[rows] - mean) / std, -10, 10)).float() for x in (raw, raw_next)
        )
        with torch.no_grad():
            values, next_values = (agent.critic(x)[..., 0].numpy() for x in (normal, normal_next))
        scaled = plain_reward_scaling(rewards[rows], done[rows], 0.9, returns_state)
        plain = plain_gae(scaled, values, next_values, terminated[rows], done[rows], 0.9, 0.8)
        expected = (plain - plain.mean()) / plain.std(ddof=1) if norm_adv else plain
        np.testing.assert_allclose(batch.advantages, expected.flatten(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(batch.observations, normal.flatten(0, 1), rtol=0, atol=1e-5)
        played = np.clip(2 + 4 * batch.actions.numpy(), -2, 6).reshape(9, 2, 2)
        np.testing.assert_allclose(env_actions[rows], played, rtol=1e-5, atol=1e-6)
        assert given_args is args and max_kl == args.max_kl * (1 - iteration / 2)

        calls = critic_calls[6 * iteration : 6 * iteration + 6]
        for epoch in (calls[:3], calls[3:]):
            assert sorted(torch.cat([call[1] for call in epoch]).tolist()) == list(range(18))
        assert not torch.equal(calls[0][1], calls[3][1])  # shuffled anew
        for learning_rate, _, given, targets in calls:
            assert learning_rate == pytest.approx(1e-3 * (1 - iteration / 2))
            assert torch.equal(given, batch.observations)
            np.testing.assert_allclose(targets, (plain + values).flatten(), rtol=0, atol=1e-4)
        step = 18 * (iteration + 1)
        explained = 1 - np.var(plain) / np.var(plain + values)
        assert curves["losses/explained_variance"][step] == pytest.approx(explained, abs=1e-4)
        assert curves["losses/value_loss"][step] == np.mean(range(6 * iteration + 1, 6 * iteration + 7))
        assert curves["losses/kl"][step] == 0.25 and curves["losses/improvement"][step] == 2
    statistics = agent.observation_statistics
    assert statistics.count == 36  # the first iteration, of which they were made before, is not in them twice
    np.testing.assert_allclose(statistics.mean, raw.reshape(-1, 3).mean(0), rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------- short runs


TINY = {"env_id": "Hopper-v5", "num_envs": 4, "num_steps": 32, "num_minibatches": 4, "critic_epochs": 2}
TINY |= {"compile": False, "total_timesteps": 512, "checkpoint_interval": 256, "eval_interval": 256}
TINY |= {"eval_episodes": 1}


def train(folder: Path, **changes) -> Path:
    return trpo.main(trpo.Args(**TINY | {"runs": str(folder)} | changes))


@pytest.mark.parametrize("step_rule", STEP_RULES)
def test_every_step_rule_trains_and_logs(step_rule, tmp_path):
    """Pendulum reaches its time limit within the run, so that there are returns to log."""
    run = train(tmp_path, env_id="Pendulum-v1", num_steps=64, total_timesteps=1024, step_rule=step_rule)
    curves, steps = read_curves(run), [256, 512, 768, 1024]
    names = ["kl", "improvement", "expected_improvement", "backtracks", "step_accepted", "grad_norm"]
    names += ["cg_residual", "value_loss", "entropy", "explained_variance"]
    tags = {f"losses/{name}" for name in names} | {"charts/learning_rate", "charts/action_std"}
    tags.add("charts/max_kl")
    sparse = {"charts/episodic_return", "charts/episodic_length"}
    evaluations = {"eval/episodic_return", "eval/episodic_return_std"}
    assert curves.keys() == tags | sparse | evaluations
    assert all(list(curves[tag]) == steps for tag in tags)
    assert all(list(curves[tag]) == [0, *steps] for tag in evaluations)
    assert all(list(curves[tag])[-1] == 1024 for tag in sparse)
    assert all(math.isfinite(x) for curve in curves.values() for x in curve.values())
    rates = [*curves["charts/learning_rate"].values()]
    np.testing.assert_allclose(rates, 1e-3 * np.array([1, 0.75, 0.5, 0.25]), rtol=1e-6)
    radius = curves["charts/max_kl"]
    np.testing.assert_allclose([*radius.values()], 0.04 * np.array([1, 0.75, 0.5, 0.25]), rtol=1e-6)
    agent = trpo.Agent.load(run)
    entropy = Normal(torch.zeros(1), agent.log_std.detach().exp()).entropy().sum().item()
    assert curves["losses/entropy"][1024] == pytest.approx(entropy, rel=1e-5)
    if step_rule == "trust-region":
        assert all(kl <= radius[step] for step, kl in curves["losses/kl"].items())
        assert min(curves["losses/improvement"].values()) > 0
    assert (max(curves["losses/cg_residual"].values()) > 0) == (step_rule != "line-search")
    assert sum(curves["losses/step_accepted"].values()) >= 3
    trpo.main(trpo.parse_args(["--evaluate", str(run), "--eval-episodes", "1"]))


def test_killed_run_equals_an_uninterrupted_one(tmp_path, capsys):
    """Killed without notice past some checkpoints, then resumed; episodes of Hopper are short."""
    settings = TINY | {"total_timesteps": 3840, "checkpoint_interval": 384}
    reference = train(tmp_path / "reference", **settings)
    process = start(SCRIPT, *flags(**settings, runs=tmp_path / "killed"), cwd=tmp_path)
    kill_when(process, nth_evaluation(5), delay=0.03)
    (run,) = (tmp_path / "killed").iterdir()
    assert 0 < trpo.load_checkpoint(run)["step"] < 3840
    trpo.main(trpo.parse_args(["--resume", str(run)]))
    assert "Resumed at step" in capsys.readouterr().out
    for name in ("checkpoint.pt", "best.pt"):
        states = [trpo.load_checkpoint(x / name) for x in (run, reference)]
        assert checkpoint_difference(*states) is None
    assert read_curves(run) == read_curves(reference)


def test_terminated_run_goes_on_by_the_same_command(tmp_path):
    """SIGTERM, as before a requeue; the second start ends as a run that nobody disturbed."""
    settings = TINY | {"total_timesteps": 3840, "checkpoint_interval": 10**9, "eval_interval": 1}
    reference = train(tmp_path / "reference", **settings)
    words = flags(**settings, runs=tmp_path / "runs", run_name="job-7")
    process = start(SCRIPT, *words, cwd=tmp_path)
    for line in process.stdout:
        if "evaluation" in line and "step         0" not in line:
            process.send_signal(signal.SIGTERM)
            break
    output, run = process.communicate(timeout=100)[0], tmp_path / "runs" / "job-7"
    assert process.returncode == 1 and f"--resume {run}" in output
    assert 0 < trpo.load_checkpoint(run)["step"] < 3840
    trpo.main(trpo.parse_args(words))
    assert checkpoint_difference(*(trpo.load_checkpoint(x) for x in (run, reference))) is None
    assert read_curves(run) == read_curves(reference)


def test_checkpoint_of_ppo_is_refused(tmp_path):
    state = {"agent": trpo.Agent(3, np.full(2, -1.0), np.full(2, 1.0)).state_dict(), "args": {}}
    ppo_continuous.save_checkpoint(tmp_path / "checkpoint.pt", state)
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(trpo.Args(**TINY))))
    for words in (["--resume", str(tmp_path)], ["--evaluate", str(tmp_path)]):
        message = refusal(lambda words=words: trpo.main(trpo.parse_args(words)))
        assert str(tmp_path / "checkpoint.pt") in message and "trpo_mujoco.py" in message
    trpo.save_checkpoint(tmp_path / "own.pt", state)
    assert trpo.load_checkpoint(tmp_path / "own.pt")["agent"].keys() == state["agent"].keys()


def test_arguments_of_ppo_are_refused(tmp_path):
    arguments = dataclasses.asdict(ppo_continuous.Args())
    (tmp_path / "args.json").write_text(json.dumps(arguments))
    message = refusal(trpo.parse_args, ["--resume", str(tmp_path)])
    assert "args.json" in message and "clip_coef" in message and "max_kl" in message


@pytest.mark.parametrize("step_rule", STEP_RULES)
def test_rewards_that_are_not_finite_end_the_run(step_rule, tmp_path):
    """From the 41st step of each environment on, in the second iteration; `refusal` sees to the exit code."""
    changes = {"env_id": "Stub/Poisoned-v0", "eval_interval": 0, "checkpoint_interval": 1}
    message = refusal(train, tmp_path, step_rule=step_rule, **changes)
    assert "nan at step 256" in message and "rewards" in message
    (run,) = tmp_path.iterdir()
    state = trpo.load_checkpoint(run)
    assert state["step"] == 128
    assert all(tensor.isfinite().all() for name, tensor in state["agent"].items() if "action" not in name)


def random_return(env_id: str, episodes: int) -> float:
    """Mean return of actions drawn uniformly."""
    env, total = gym.make(env_id), 0.0
    env.action_space.seed(0)
    for episode in range(episodes):
        env.reset(seed=episode)
        done = False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, done = total + reward, terminated or truncated
    return total / episodes


def test_it_learns(tmp_path):
    """The most that can be had is 1000, and seeds 1 to 5 have it by 12288 steps."""
    settings = {"env_id": "InvertedPendulum-v5", "num_envs": 8, "num_steps": 128, "num_minibatches": 8}
    settings |= {"critic_epochs": 5, "max_kl": 0.02, "anneal_lr": False, "anneal_kl": False}
    settings["total_timesteps"] = 12_288
    run = train(tmp_path, **settings, eval_episodes=5, eval_interval=10**9, checkpoint_interval=10**9)
    evaluation = read_curves(run)["eval/episodic_return"]
    assert random_return("InvertedPendulum-v5", 20) < 20
    assert evaluation[0] < 60 and evaluation[12_288] > 900
