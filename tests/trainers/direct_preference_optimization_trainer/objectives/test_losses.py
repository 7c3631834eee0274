"""Every objective against a float64 form written from its formula, value and gradient."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel import DPOConfig
from easydel.trainers.direct_preference_optimization_trainer.objectives.f_divergence import F_DIVERGENCES
from easydel.trainers.direct_preference_optimization_trainer.objectives.losses import LOSSES, PairScores
from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import Objective
from easydel.trainers.direct_preference_optimization_trainer.objectives.options import (
    LOSS_OPTIONS,
    LOSSES_WITHOUT_REFERENCE,
    SORTING_LOSSES,
)

BETA, EPSILON, TAU = 0.3, 0.1, 0.5
PAIRS = 6
RNG = np.random.default_rng(0)
LOGPS = RNG.normal(-30, 8, (2, PAIRS))
REFERENCE = LOGPS + RNG.normal(0, 3, (2, PAIRS))
LENGTHS = RNG.integers(3, 30, (2, PAIRS)).astype(float)


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def sigma(x):
    return np.exp(log_sigmoid(x))


def h(name, r, alpha):
    if name == "forward_kl":
        return 1 - np.exp(-r)
    if name == "js_divergence":
        return np.log(2) + log_sigmoid(r)
    if name == "alpha_divergence" and alpha != 1:
        return (np.exp((alpha - 1) * r) - 1) / (alpha - 1)
    return r


def expected_mean_loss(name, logps, f="reverse_kl", alpha=0.5, epsilon=EPSILON):
    """The update's loss in float64, straight from the formulas; `logps` [2, pairs]."""
    r_c, r_r = logps - REFERENCE
    s_c, s_r = h(f, r_c, alpha), h(f, r_r, alpha)
    n_c, n_r = LENGTHS
    delta = s_c - s_r

    def smoothed(x):
        return -(1 - epsilon) * log_sigmoid(BETA * x) - epsilon * log_sigmoid(-BETA * x)

    if name == "exo_pair":
        q_w, q_l = sigma(BETA * delta), sigma(-BETA * delta)
        losses = q_w * (np.log(q_w) - np.log(1 - epsilon)) + q_l * (np.log(q_l) - np.log(epsilon))
    elif name == "aot":
        losses = smoothed(np.sort(logps[0] - logps[1]) - np.sort(REFERENCE[0] - REFERENCE[1]))
    elif name in ("aot_unpaired", "aot_pair"):
        losses = smoothed(np.sort(r_c) - np.sort(r_r))
    elif name == "discopop":
        m = sigma(BETA * delta / TAU)
        losses = (1 - m) * -log_sigmoid(BETA * delta) + m * np.exp(-BETA * delta)
    else:
        losses = {
            "sigmoid": lambda: smoothed(delta),
            "hinge": lambda: np.maximum(0, 1 - BETA * delta),
            "ipo": lambda: (s_c / n_c - s_r / n_r - 1 / (2 * BETA)) ** 2,
            "sigmoid_norm": lambda: -log_sigmoid(BETA * (s_c / n_c - s_r / n_r)),
            "nca_pair": lambda: (
                -log_sigmoid(BETA * s_c) - 0.5 * log_sigmoid(-BETA * s_c) - 0.5 * log_sigmoid(-BETA * s_r)
            ),
            "robust": lambda: (
                (-(1 - epsilon) * log_sigmoid(BETA * delta) + epsilon * log_sigmoid(-BETA * delta)) / (1 - 2 * epsilon)
            ),
            "bco_pair": lambda: -log_sigmoid(BETA * s_c) - log_sigmoid(-BETA * s_r),
            "sppo_hard": lambda: (s_c - 0.5 / BETA) ** 2 + (s_r + 0.5 / BETA) ** 2,
            "apo_zero": lambda: 1 - sigma(BETA * r_c) + sigma(BETA * r_r),
            "apo_down": lambda: sigma(BETA * r_c) + 1 - sigma(BETA * delta),
            "sft": lambda: -logps[0] * PAIRS / n_c.sum(),
        }[name]()
    return losses.mean()


def mean_loss(objective, logps, extra_slots=0):
    """The same through `Objective`; empty slots stand among the pairs, as in a packed batch."""
    pad = [(0, 0), (0, extra_slots)]
    reference, lengths = jnp.pad(jnp.asarray(REFERENCE), pad), jnp.pad(jnp.asarray(LENGTHS), pad, constant_values=1)
    logps = jnp.pad(logps, pad)
    ratios = logps - reference
    is_pair = jnp.arange(PAIRS + extra_slots) < PAIRS
    scores = PairScores(
        *(objective.score(r) for r in ratios), *ratios, *logps, *lengths, is_pair, jnp.asarray(LENGTHS[0].mean())
    )
    return jnp.sum(jnp.where(is_pair, objective(scores), 0.0)) / PAIRS


def objective_of(*names, f="reverse_kl", alpha=0.5, weights=None, rpo_alpha=None, epsilon=EPSILON):
    return Objective(names, weights or (1.0,) * len(names), BETA, epsilon, f, alpha, TAU, rpo_alpha)


def numerical_gradient(function, x, step=1e-6):
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[place] = step
        gradient[place] = (function(x + shift) - function(x - shift)) / (2 * step)
    return gradient


CASES = [(name, "reverse_kl", 0.5) for name in LOSSES] + [
    (name, f, alpha)
    for name, (f, alpha) in itertools.product(
        LOSSES, [("forward_kl", 0.5), ("js_divergence", 0.5), ("alpha_divergence", 0.4), ("alpha_divergence", 1.0)]
    )
    if "f_divergence_type" in LOSS_OPTIONS[name]
]


@pytest.mark.parametrize("name, f, alpha", CASES)
def test_value_and_gradient_equal_the_float64_form(name, f, alpha):
    with jax.enable_x64(True):
        objective = objective_of(name, f=f, alpha=alpha)
        value, gradient = jax.value_and_grad(lambda x: mean_loss(objective, x, extra_slots=2))(jnp.asarray(LOGPS))
        expected = expected_mean_loss(name, LOGPS, f, alpha)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        wanted = numerical_gradient(lambda x: expected_mean_loss(name, x, f, alpha), LOGPS)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-6, atol=1e-6 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("f", F_DIVERGENCES)
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_log_ratios_stay_finite_in_float32(name, f):
    if f != "reverse_kl" and "f_divergence_type" not in LOSS_OPTIONS[name]:
        pytest.skip(f"{name} knows no divergence")
    reference = jnp.asarray(REFERENCE, jnp.float32)
    for chosen, rejected in itertools.product([-1e4, 0.0, 1e4], repeat=2):
        logps = reference + jnp.array([[chosen], [rejected]], jnp.float32)
        value, gradient = jax.value_and_grad(lambda x: mean_loss(objective_of(name, f=f), x))(logps)
        assert jnp.isfinite(value) and jnp.isfinite(gradient).all(), (chosen, rejected)


def test_a_list_of_losses_is_the_weighted_sum_of_their_means():
    total = mean_loss(objective_of("sigmoid", "bco_pair", "sft", weights=(1.0, 0.5, 2.0)), jnp.asarray(LOGPS))
    parts = [expected_mean_loss(name, LOGPS) for name in ("sigmoid", "bco_pair", "sft")]
    np.testing.assert_allclose(total, np.dot(parts, [1.0, 0.5, 2.0]), rtol=1e-5)


def test_every_divergence_is_zero_where_policy_and_reference_agree():
    for function in F_DIVERGENCES.values():
        assert float(function(jnp.zeros(()), 0.5)) == pytest.approx(0.0, abs=1e-7)


def test_the_table_of_options_and_the_functions_agree():
    assert LOSS_OPTIONS.keys() == LOSSES.keys()
    assert LOSSES.keys() >= SORTING_LOSSES


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_says_which_losses_read_the_reference(name):
    def loss(reference):
        ratios = LOGPS - reference
        lengths, is_pair = jnp.asarray(LENGTHS), jnp.ones(PAIRS, bool)
        scores = PairScores(*ratios, *ratios, *jnp.asarray(LOGPS), *lengths, is_pair, jnp.asarray(LENGTHS[0].mean()))
        return objective_of(name)(scores).mean()

    reads = float(jnp.abs(jax.grad(loss)(jnp.asarray(REFERENCE))).max()) > 0
    assert reads == (name not in LOSSES_WITHOUT_REFERENCE)
    smoothing = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    assert DPOConfig(loss_type=name, **smoothing).reads_reference == reads


OPTIONS = {"label_smoothing": 0.1, "f_divergence_type": "js_divergence", "discopop_tau": 0.3}


@pytest.mark.parametrize("option, value", OPTIONS.items())
@pytest.mark.parametrize("name", LOSSES)
def test_an_option_either_changes_the_loss_or_is_refused(name, option, value):
    base = {"loss_type": name} | ({"label_smoothing": 0.2} if name == "exo_pair" else {})
    if option not in LOSS_OPTIONS[name]:
        with pytest.raises(ValueError, match=f"{option}=.* has no effect with loss_type='{name}'"):
            DPOConfig(**base | {option: value})
        return
    DPOConfig(**base | {option: value})
    plain = objective_of(name, epsilon=0.2 if name == "exo_pair" else 0.0)
    changed = dataclasses.replace(plain, **{option: value})
    assert float(mean_loss(plain, jnp.asarray(LOGPS))) != pytest.approx(float(mean_loss(changed, jnp.asarray(LOGPS))))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"loss_type": []}, "at least one objective"),
        ({"loss_type": ["sigmoid", "hinj"]}, "loss_type='hinj'"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 numbers for 2 objectives"),
        ({"loss_type": "exo_pair"}, "set it above 0"),
        ({"loss_type": "aot", "gradient_accumulation_steps": 2}, "sorts all pairs"),
        ({"loss_type": "aot", "use_weighting": True}, "compares sorted values"),
        ({"loss_type": "sft", "beta": 0.2}, "no effect with loss_type='sft'"),
        ({"f_alpha_divergence_coef": 0.3}, "alpha_divergence"),
        ({"ld_alpha": 1.0}, "ld_alpha=1.0"),
        ({"discopop_tau": 0.0}, "discopop_tau=0.0"),
    ],
)
def test_objectives_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        DPOConfig(**options)
