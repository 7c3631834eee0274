"""Every objective against a float64 form written from its formula, value and gradient."""

from __future__ import annotations

import dataclasses
import itertools
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel import DPOConfig
from easydel.trainers.direct_preference_optimization_trainer.objectives.combined import make_objective
from easydel.trainers.direct_preference_optimization_trainer.objectives.f_divergence import (
    F_DIVERGENCES,
    DivergenceObjective,
    FDivergence,
)
from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import (
    OBJECTIVES,
    option_fields,
    owners,
    register,
)
from tests.trainers.direct_preference_optimization_trainer.objectives.closed_form import (
    LENGTHS,
    LOGPS,
    PAIRS,
    REFERENCE,
    log_sigmoid,
    mean_loss,
    numerical_gradient,
    scores_of,
    sigma,
)

BETA, EPSILON, TAU = 0.3, 0.1, 0.5
# Others, each in a file of its own, have their formula in a test of their own.
NAMES = (
    *("sigmoid", "hinge", "ipo", "sigmoid_norm", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "aot_pair", "apo_zero", "apo_down", "discopop", "sft"),
)


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


def objective_of(*names, f="reverse_kl", alpha=0.5, weights=None, rpo_alpha=None, epsilon=EPSILON, **options):
    if f != "alpha_divergence":
        alpha = 0.5
    given = {"beta": BETA, "label_smoothing": epsilon, "f_divergence_type": f, "f_alpha_divergence_coef": alpha}
    return make_objective(names, given | {"discopop_tau": TAU} | options, weights, rpo_alpha)


CASES = [(name, "reverse_kl", 0.5) for name in NAMES] + [
    (name, f, alpha)
    for name, (f, alpha) in itertools.product(
        NAMES, [("forward_kl", 0.5), ("js_divergence", 0.5), ("alpha_divergence", 0.4), ("alpha_divergence", 1.0)]
    )
    if issubclass(OBJECTIVES[name], DivergenceObjective)
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
@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_log_ratios_stay_finite_in_float32(name, f):
    if f != "reverse_kl" and not issubclass(OBJECTIVES[name], DivergenceObjective):
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


def test_every_divergence_has_its_name_in_the_type_of_the_option():
    assert set(get_args(FDivergence)) == F_DIVERGENCES.keys()


def test_every_option_of_an_objective_is_a_field_of_the_config_with_the_same_default_and_type():
    fields, types = DPOConfig.__dataclass_fields__, get_type_hints(DPOConfig)
    for objective in OBJECTIVES.values():
        own = get_type_hints(objective)
        for field in dataclasses.fields(objective):
            assert fields[field.name].default == field.default, (objective, field.name)
            assert fields[field.name].metadata["help"] == field.metadata["help"] != "", (objective, field.name)
            assert types[field.name] == own[field.name], (objective, field.name)


def test_two_objectives_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two objectives are called sigmoid"):
        register("sigmoid")(OBJECTIVES["hinge"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_says_whether_it_reads_the_reference(name):
    def loss(reference):
        return objective_of(name)(scores_of(LOGPS, reference)).mean()

    reads = float(jnp.abs(jax.grad(loss)(jnp.asarray(REFERENCE))).max()) > 0
    assert reads == OBJECTIVES[name].needs_reference
    smoothing = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    assert DPOConfig(loss_type=name, **smoothing).reads_reference == reads


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_says_whether_it_reads_the_margin(name):
    def loss(margin):
        return objective_of(name)(scores_of(LOGPS, margin=margin)).mean()

    reads = float(jnp.abs(jax.grad(loss)(jnp.ones(PAIRS))).max()) > 0
    assert reads == OBJECTIVES[name].needs_margin


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_says_whether_it_needs_the_whole_update(name):
    """Where it does, the loss of a pair depends on the other pairs."""
    objective = objective_of(name)

    def loss_of_first(others):
        logps = jnp.asarray(LOGPS).at[:, 1:].set(others)
        return objective(scores_of(logps))[0]

    depends = float(jnp.abs(jax.grad(loss_of_first)(jnp.asarray(LOGPS[:, 1:]))).max()) > 0
    assert depends == OBJECTIVES[name].needs_whole_update


OPTIONS = {"beta": 0.7, "label_smoothing": 0.1, "f_divergence_type": "js_divergence", "discopop_tau": 0.3}
OPTIONS |= {name: 1.5 * field.default + 0.1 for name, field in option_fields().items() if name not in OPTIONS}


@pytest.mark.parametrize("option, value", OPTIONS.items())
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_option_either_changes_the_loss_or_is_refused(name, option, value):
    base = {"loss_type": name} | ({"label_smoothing": 0.2} if name == "exo_pair" else {})
    if option == "f_alpha_divergence_coef":
        base["f_divergence_type"] = "alpha_divergence"
    if name not in owners(option):
        with pytest.raises(ValueError, match=r"=.* has no effect with loss_type='" + name):
            DPOConfig(**base | {option: value})
        return
    DPOConfig(**base | {option: value})
    own = {key: value for key, value in base.items() if key != "loss_type"}
    plain, changed = make_objective([name], own), make_objective([name], own | {option: value})
    # Rolled, so that some completions have become more likely than under the reference and some less.
    logps = jnp.roll(jnp.asarray(LOGPS), 1, axis=1)
    assert float(mean_loss(plain, logps)) != pytest.approx(float(mean_loss(changed, logps)))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"loss_type": []}, "at least one objective"),
        ({"loss_type": ["sigmoid", "hinj"]}, "loss_type='hinj'"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 numbers for 2 objectives"),
        ({"loss_type": "exo_pair"}, "set it above 0"),
        ({"loss_type": "aot", "gradient_accumulation_steps": 2}, "sorts all pairs"),
        ({"loss_type": "aot", "use_weighting": True}, "compares sorted values"),
        ({"loss_type": "sft", "use_weighting": True}, "does not compare completions"),
        ({"loss_type": "sft", "reference_free": True}, "compares the policy with no reference"),
        *(
            ({"loss_type": name, "f_divergence_type": "js_divergence"}, f"no effect with loss_type='{name}'")
            for name in ("nca_pair", "bco_pair", "sppo_hard", "apo_down")
        ),
        ({"loss_type": "sft", "beta": 0.2}, "no effect with loss_type='sft'"),
        ({"f_alpha_divergence_coef": 0.3}, "alpha_divergence"),
        ({"ld_alpha": 1.0}, "ld_alpha=1.0"),
        ({"discopop_tau": 0.0}, "discopop_tau=0.0"),
    ],
)
def test_objectives_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        DPOConfig(**options)
