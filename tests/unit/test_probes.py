"""Probes of other libraries as heads: the same values, what is refused, saved and loaded, and steered by."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, RidgeClassifier, SGDClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.svm import LinearSVC
from torch import nn

from hf_value_steer import AbstentionConfig, ValueFilterConfig, ValueHead, fingerprint
from tests.families import FAMILIES, build, prompts
from tests.steer import steer
from tests.tiny_models import build_tiny


WIDTH = 12
PLACE = {"layer": 3, "polarity": "undesirable"}
RANDOM = np.random.default_rng(0)
FEATURES = RANDOM.normal(3.0, RANDOM.uniform(0.1, 5.0, WIDTH), (200, WIDTH))
LABELS = (FEATURES @ RANDOM.normal(size=WIDTH) + RANDOM.normal(size=200) > 0).astype(int)

CLASSIFIERS = {
    "logistic": LogisticRegression(max_iter=10_000),
    "logistic-cv": LogisticRegressionCV(
        Cs=3, max_iter=10_000, scoring="accuracy", l1_ratios=(0.0,), use_legacy_attributes=False
    ),
    "without intercept": LogisticRegression(max_iter=10_000, fit_intercept=False),
    "sgd": SGDClassifier(loss="log_loss", alpha=0.1, random_state=0),
}
STEPS = {
    "none": [],
    "scaled": [StandardScaler()],
    "centred": [StandardScaler(with_std=False)],
    "by size": [StandardScaler(with_mean=False)],
    "as it is": [StandardScaler(with_mean=False, with_std=False), "passthrough"],
    "principal": [StandardScaler(), PCA(5)],
    "white": [PCA(5, whiten=True), StandardScaler()],
}


def fitted(*steps, labels=LABELS):
    return make_pipeline(*steps).fit(FEATURES, labels)


def values(head, features=FEATURES):
    with torch.no_grad():
        return head(torch.tensor(features, dtype=torch.float32)).value.numpy()


class TheirValueHead(nn.Module):
    """As in TRL's `modeling_value_head.py`."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        self.summary = nn.Linear(width, 1)
        self.flatten = nn.Flatten()

    def forward(self, hidden_states):
        return self.summary(self.dropout(hidden_states))


class TheirModel(nn.Module):
    """A model with such a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.pretrained_model, self.v_head = nn.Linear(WIDTH, WIDTH), TheirValueHead()

    def state_dict(self):
        named = {f"v_head.{name}": tensor for name, tensor in self.v_head.state_dict().items()}
        return {**self.pretrained_model.state_dict(), **named}


@pytest.mark.parametrize(
    "form", [list, np.array, np.float16, torch.tensor, lambda w: torch.tensor([w]).bfloat16(), lambda w: [w]]
)
def test_a_linear_probe_in_any_form(form):
    weight = [0.5, -0.25, 2.0]
    head = ValueHead.from_linear(form(weight), -0.5, layer=1, polarity="desirable", attribute="truth", threshold=0.4)
    features = torch.randn(4, 7, 3)
    assert torch.equal(head(features).logits, features @ torch.tensor(weight) - 0.5)
    config = head.config
    assert (config.architecture, config.feature_layers, config.polarity) == ("linear", [1], "desirable")
    assert (config.attribute, config.threshold, head.training) == ("truth", 0.4, False)


@pytest.mark.parametrize("layer", [-2, 0.5, "final", [0, 2], (1, "final"), np.int64(3), np.array([0, 1])])
def test_a_probe_reads_what_feature_layers_can_say(layer):
    head = ValueHead.from_linear(torch.ones(8), layer=layer, polarity="undesirable")
    assert head.config.feature_layers == (list(layer) if isinstance(layer, list | tuple | np.ndarray) else [layer])


def test_a_probe_of_means_reads_means():
    head = ValueHead.from_linear([1.0, 2.0], torch.tensor([0.1]), **PLACE, temporal="mean")
    features = torch.randn(3, 5, 2)
    means = features.cumsum(dim=1) / torch.arange(1, 6)[:, None]
    torch.testing.assert_close(head(features).logits, means @ torch.tensor([1.0, 2.0]) + 0.1)


@pytest.mark.parametrize(
    ("weight", "more", "message"),
    [
        (np.ones((2, 3)), {}, r"`weight` has to be of shape \(width,\) or \(1, width\), .* got \(2, 3\)"),
        (np.ones((3, 1)), {}, r"got \(3, 1\)"),
        (np.ones((1, 1, 3)), {}, r"got \(1, 1, 3\)"),
        ([], {}, r"got \(0,\)"),
        (0.5, {}, r"got \(\)"),
        (["a"], {}, "`weight` has to be dense and of numbers, got a list"),
        ([1.0, np.nan], {}, "`weight` holds numbers that are NaN"),
        ([1e300, 1.0], {}, "beyond float32"),
        ([1.0], {"bias": np.inf}, "`bias` holds numbers that are NaN, infinite"),
        ([1.0], {"bias": [0.0, 1.0]}, r"`bias` has to be one number, got \(2,\)"),
        ([0.0, 1e-60], {}, "`weight` is zero"),
        ([1.0], {"attribut": "x"}, "did you mean `attribute`"),
        ([1.0], {"attributes": [{"name": "a"}, {"name": "b"}]}, "`attributes` are for heads of several"),
    ],
)
def test_no_linear_probe(weight, more, message):
    with pytest.raises(ValueError, match=message):
        ValueHead.from_linear(weight, **{**PLACE, **more})


@pytest.mark.parametrize("wrong", [{"layer": 1.5}, {"layer": True}, {"polarity": "bad"}, {"threshold": 2.0}])
def test_fields_are_checked_as_those_of_any_head(wrong):
    with pytest.raises(StrictDataclassError, match={"layer": "feature_layers"}.get(*wrong, *wrong)):
        ValueHead.from_linear([1.0], **{**PLACE, **wrong})


@pytest.mark.parametrize("classifier", CLASSIFIERS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_values_are_those_of_predict_proba(steps, classifier):
    probe = fitted(*STEPS[steps], CLASSIFIERS[classifier])
    head = ValueHead.from_sklearn(probe, **PLACE)
    np.testing.assert_allclose(values(head), probe.predict_proba(FEATURES)[:, 1], rtol=0, atol=1e-5)
    assert 0.1 < values(head).mean() < 0.9


@pytest.mark.parametrize("names", [("safe", "toxic"), ("toxic", "safe"), (True, False), (7, 3)])
def test_the_positive_class_is_the_one_that_is_named(names):
    labels = np.array(names)[LABELS]
    probe = LogisticRegression(max_iter=10_000).fit(FEATURES, labels)
    for name in names:
        head = ValueHead.from_sklearn(probe, **PLACE, positive=name)
        column = probe.predict_proba(FEATURES)[:, list(probe.classes_).index(name)]
        np.testing.assert_allclose(values(head), column, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"`positive` has to be one of the classes .*; got 'bad'"):
        ValueHead.from_sklearn(probe, **PLACE, positive="bad")


def of_an_older_version():
    probe = LogisticRegression(max_iter=10_000).fit(FEATURES, LABELS)
    probe.multi_class = "multinomial"
    return probe


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (lambda: LinearSVC().fit(FEATURES, LABELS), "ends in LinearSVC, whose decision function is no log odds"),
        (lambda: fitted(RidgeClassifier()), "ends in RidgeClassifier"),
        (lambda: fitted(SGDClassifier()), r"ends in SGDClassifier\(loss='hinge'\), whose"),
        (of_an_older_version, r"LogisticRegression\(multi_class='multinomial'\)"),
        (lambda: fitted(StandardScaler()), "ends in StandardScaler"),
        (lambda: np.ones(3), "ends in ndarray"),
        (lambda: fitted(MinMaxScaler(), LogisticRegression()), "has the step MinMaxScaler"),
        (lambda: fitted(make_pipeline(StandardScaler()), LogisticRegression()), "has the step Pipeline"),
        (lambda: LogisticRegression(), "has a LogisticRegression that is not fitted"),
        (lambda: make_pipeline(StandardScaler(), fitted(LogisticRegression())[-1]), "has a StandardScaler that is"),
        (lambda: make_pipeline(PCA(), fitted(LogisticRegression())[-1]), "has a PCA that is not fitted"),
        (lambda: fitted(LogisticRegression(max_iter=10_000), labels=np.arange(200) % 3), "two classes, got 3"),
        (lambda: fitted(LogisticRegression())[-1].sparsify(), "`coef_` has to be dense"),
    ],
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_no_classifier_with_log_odds(probe, message):
    with pytest.raises(ValueError, match=message):
        ValueHead.from_sklearn(probe(), **PLACE)


@pytest.mark.parametrize(
    "part", [lambda m: m, lambda m: m.v_head, TheirModel.state_dict, lambda m: m.v_head.state_dict()]
)
def test_a_value_head_of_trl(part):
    theirs = TheirModel()
    head = ValueHead.from_trl(part(theirs), scale=1.5, offset=-0.25, attribute="reward", threshold=0.5)
    features = torch.randn(2, 3, WIDTH)
    returns = theirs.v_head.eval()(features).squeeze(-1)
    torch.testing.assert_close(head(features).value, torch.sigmoid((returns + 0.25) / 1.5))
    assert (head.config.polarity, head.config.feature_layers) == ("desirable", ["final"])
    assert head.config.training == {"source": "trl", "scale": 1.5, "offset": -0.25}


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        (TheirModel, {"scale": 0.0}, "`scale` has to be a finite number above 0, got 0.0"),
        (TheirModel, {"scale": np.array([1.0, 2.0])}, "`scale` has to be a finite number above 0"),
        (TheirModel, {"offset": np.nan}, "`offset` has to be a finite number, got nan"),
        (lambda: nn.Linear(3, 1), {}, r"`model` has to be TRL's model .* got \['bias', 'weight'\]"),
        (lambda: {"summary.weight": torch.ones(1, 3)}, {}, r"got \['summary.weight'\]"),
        (lambda: "org/model", {}, "got a str"),
        (lambda: {"summary.weight": torch.ones(2, 3), "summary.bias": torch.ones(2)}, {}, "shape"),
    ],
)
def test_no_value_head_of_trl(model, more, message):
    with pytest.raises(ValueError, match=message):
        ValueHead.from_trl(model(), **{"scale": 1.0, "offset": 0.0, **more})


@pytest.mark.parametrize("family", FAMILIES)
def test_trl_reads_the_final_state(family):
    """TRL's head reads `hidden_states[-1]`."""
    model, inputs = build(family), prompts(1)
    with torch.no_grad():
        state = model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1]
        theirs = TheirValueHead(state.shape[1]).eval()
        expected = torch.sigmoid(theirs(state)[:, 0])
    head = ValueHead.from_trl(theirs, scale=1.0, offset=0.0, threshold=0.5)
    out = steer(model, ValueFilterConfig(value_head=head), **inputs, max_new_tokens=1)
    torch.testing.assert_close(out.prompt_values, expected, rtol=0, atol=1e-5)


def test_a_probe_is_saved_and_loaded_as_any_head(tmp_path):
    probe = fitted(StandardScaler(), LogisticRegression())
    head = ValueHead.from_sklearn(
        probe, layer=[-2], polarity="undesirable", backbone="org/base", training={"texts": 9}
    )
    head.save_pretrained(tmp_path)
    again = ValueHead.from_pretrained(tmp_path)
    assert np.array_equal(values(again), values(head)) and again.fingerprint() == head.fingerprint()
    assert again.config.training == {"source": "scikit-learn", "texts": 9}
    assert again.config.feature_layers == [-2] and "scikit-learn" in (tmp_path / "README.md").read_text()


@pytest.fixture(scope="module")
def steered_by():
    """A model, a probe of its `hidden_states[2]`, which is what layer 1 of 4 puts out, and the head of the probe."""
    model = build_tiny("llama", 4)
    tokens = torch.randint(3, 100, (40, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states[2].flatten(0, 1).numpy()
    labels = (tokens.flatten() % 2 == 0).numpy()
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000)).fit(states, labels)
    told = {"threshold": 0.5, "backbone_fingerprint": fingerprint(model)}
    return model, probe, ValueHead.from_sklearn(probe, layer=1, polarity="undesirable", positive=True, **told)


def test_a_probe_filters(steered_by):
    model, probe, head = steered_by
    inputs = prompts(3)
    out = steer(model, ValueFilterConfig(value_head=head, num_candidates=8), **inputs, max_new_tokens=10)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 10, dtype=torch.long)], dim=1)
    with torch.no_grad():
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        read = model(out.sequences, attention_mask=mask, position_ids=places, output_hidden_states=True)
    states = read.hidden_states[2][:, -10:].flatten(0, 1).numpy()
    expected = probe.predict_proba(states)[:, 1]
    np.testing.assert_allclose(out.token_values.flatten().numpy(), expected, rtol=0, atol=1e-4)
    plain = steer(model, ValueFilterConfig(value_head=head, max_interventions=0), **inputs, max_new_tokens=10)
    assert out.interventions.any() and out.token_values.mean() < plain.token_values.mean() - 0.1


def test_a_probe_abstains_and_belongs_to_its_model(steered_by):
    model, _, head = steered_by
    out = steer(model, AbstentionConfig(value_head=head, patience=1), **prompts(3), max_new_tokens=10)
    assert out.abstained.any()
    with pytest.raises(ValueError, match="fingerprint"):
        steer(build_tiny("llama", 3), ValueFilterConfig(value_head=head), **prompts(1), max_new_tokens=2)


def test_what_hardly_varies_is_refused():
    """Weights that float32 cannot hold: a whitened direction without variance, a feature that is almost constant."""
    doubled = np.c_[FEATURES, FEATURES[:, :3] * 2]
    constant = FEATURES.copy()
    constant[:, 0] = 1e3 + 1e-6 * RANDOM.normal(size=len(FEATURES))
    for step, features in ((PCA(whiten=True), doubled), (StandardScaler(), constant)):
        probe = make_pipeline(step, LogisticRegression(max_iter=10_000)).fit(features, LABELS)
        with pytest.raises(ValueError, match="float32 holds to .* in the log odds only"):
            ValueHead.from_sklearn(probe, **PLACE)


def test_a_search_is_sent_to_its_best_probe():
    search = GridSearchCV(LogisticRegression(max_iter=10_000), {"C": [0.1, 1.0]}, cv=2).fit(FEATURES, LABELS)
    with pytest.raises(ValueError, match="best_estimator_"):
        ValueHead.from_sklearn(search, **PLACE)
    np.testing.assert_allclose(
        values(ValueHead.from_sklearn(search.best_estimator_, **PLACE)),
        search.predict_proba(FEATURES)[:, 1],
        atol=1e-5,
    )


@pytest.mark.parametrize("field", ["hidden_size", "architecture", "feature_layers"])
def test_what_follows_from_the_weights_is_not_given(field):
    with pytest.raises(ValueError, match=f"`{field}` follows from"):
        ValueHead.from_linear(np.ones(WIDTH), **PLACE, **{field: 1})


def test_the_record_of_a_training_is_a_dict():
    with pytest.raises(ValueError, match="`training` has to be a dict"):
        ValueHead.from_sklearn(fitted(LogisticRegression()), **PLACE, training="x")
    with pytest.raises(ValueError, match="`layer` is not for TRL"):
        ValueHead.from_trl(TheirValueHead(), scale=1.0, offset=0.0, layer=3)
