"""AutoAttack: the package's verdict, and none of its side effects."""

import logging
import sys

import pytest
import torch
from torch import nn

from attacks.auto_attack import AutoAttack
from base.errors import ConfigError
from base.seeding import torch_generator

pyautoattack = pytest.importorskip("pyautoattack")
PACKAGE_NORM = {"linf": "Linf", "l2": "L2"}
EPSILON = {"linf": 0.015, "l2": 0.15}


def shortened(attack):
    """The package's attack with fewer steps."""
    attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = 5
    attack.square.n_queries = 20
    return attack


class Short(AutoAttack):
    def _build(self, *args):
        return shortened(super()._build(*args))


def make_model(n_classes=10):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, n_classes)
        )
    with torch.no_grad():
        model[-1].weight.mul_(5)
    return model


def make_images(model, n):
    """Images and what the model says about them, but for the first, whose label is wrong."""
    images = torch.rand(n, 3, 8, 8, generator=torch_generator(2, "images"))
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 4
    return images, labels


def broken(model, points, labels):
    with torch.no_grad():
        return model(points).argmax(dim=1) != labels


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("n_classes", [4, 10])
def test_the_verdict_is_that_of_the_package(norm, n_classes):
    model = make_model(n_classes)
    images, labels = make_images(model, 24)
    attack = Short(EPSILON[norm], norm)
    points = attack(model, images, labels, generators=torch_generator(3, "attack"))

    seed = int(torch.randint(2**31, (), generator=torch_generator(3, "attack")))
    with torch.random.fork_rng():
        package = shortened(
            pyautoattack.AutoAttack(
                model, norm=PACKAGE_NORM[norm], eps=EPSILON[norm], seed=seed, version="standard"
            )
        )
        package.apgd_targeted.n_target_classes = package.fab.n_target_classes = min(
            9, n_classes - 1
        )
        expected, _ = package.run_standard_evaluation(images, labels)
    torch.testing.assert_close(points, expected, rtol=0, atol=1e-6)
    found = broken(model, points, labels)
    assert torch.equal(found, broken(model, expected, labels))
    assert 2 < found.sum() < 24
    assert torch.equal(points[~found], images[~found])
    assert torch.equal(points[0], images[0])
    assert attack.threat_model.distance(points, images).max() <= EPSILON[norm] + 1e-6


def test_numbers_are_the_standard_ones():
    attack = AutoAttack(0.1)._build(make_model(), 10, 0, torch.device("cpu"))
    assert attack.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert (
        attack.apgd.n_iter,
        attack.apgd_targeted.n_iter,
        attack.fab.n_iter,
        attack.square.n_queries,
    ) == (
        100,
        100,
        100,
        5000,
    )
    assert attack.apgd_targeted.n_target_classes == attack.fab.n_target_classes == 9


def test_leaves_nothing_behind(capsys, caplog):
    model = make_model()
    images, labels = make_images(model, 3)
    logger, root = logging.getLogger("auto-attack"), logging.getLogger()
    handler = logging.StreamHandler(sys.stdout)
    logger.addHandler(handler)
    calls = []

    def tracer(frame, event, argument):
        calls.append(event)

    def traces():
        return (
            list(logger.handlers),
            logger.level,
            logger.propagate,
            logger.disabled,
            list(root.handlers),
            root.level,
        )

    torch.manual_seed(11)
    before, state, tracer_before = traces(), torch.get_rng_state(), sys.gettrace()
    sys.settrace(tracer)
    try:
        with caplog.at_level(logging.DEBUG):
            Short(0.1)(model, images, labels)
        after = sys.gettrace()
    finally:
        sys.settrace(tracer_before)
        logger.removeHandler(handler)
    assert after is tracer
    assert traces() == (before[0][:-1], *before[1:])
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr() == ("", "")
    assert caplog.records == []
    assert all(parameter.grad is None for parameter in model.parameters())


def test_restores_after_an_error(monkeypatch):
    def fail(*args, **kwargs):
        torch.manual_seed(0)
        sys.settrace(None)
        raise RuntimeError("out of memory")

    logger = logging.getLogger("auto-attack")
    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", fail)
    images, labels = make_images(make_model(), 2)
    tracer_before, state = sys.gettrace(), torch.get_rng_state()
    before = (list(logger.handlers), logger.level, logger.propagate)
    sys.settrace(lambda *_: None)
    tracer = sys.gettrace()
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            AutoAttack(0.1)(make_model(), images, labels)
        after = sys.gettrace()
    finally:
        sys.settrace(tracer_before)
    assert after is tracer
    assert (logger.handlers, logger.level, logger.propagate) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_collects_warnings_once_and_quietly(capsys, caplog):
    class Random(nn.Module):
        def forward(self, images):
            noise = torch.rand(len(images), 5, generator=torch_generator(len(seen), "noise"))
            seen.append(1)
            return model(images) + noise

    seen, model = [], make_model(5)
    images, labels = make_images(model, 6)
    attack = Short(0.02)
    attack(Random(), images, labels)
    attack(Random(), images[:4], labels[:4])
    assert [
        ("5 classes: 4 targets" in warning, "randomized" in warning)
        for warning in attack.warnings[:2]
    ] == [
        (True, False),
        (False, True),
    ]
    assert len(attack.warnings) == len(set(attack.warnings))
    assert caplog.records == []
    assert capsys.readouterr() == ("", "")


def test_one_suspicious_model_does_not_taint_the_next():
    class Dynamic(nn.Module):
        def forward(self, images):
            def backward():
                return model(images)

            return backward()

    model = make_model()
    images, labels = make_images(model, 2)
    suspicious, honest = Short(0.1), Short(0.1)
    suspicious(Dynamic(), images, labels)
    honest(model, images, labels)
    assert any("dynamic" in warning for warning in suspicious.warnings)
    assert honest.warnings == []


def test_one_image():
    model = make_model()
    images, labels = make_images(model, 4)
    points = Short(0.1)(model, images[-1:], labels[-1:])
    assert broken(model, points, labels[-1:]).all()
    assert torch.equal(Short(0.0)(model, images[-1:], labels[-1:]), images[-1:])


def test_all_misclassified_come_back_unchanged():
    model = make_model()
    images, labels = make_images(model, 4)
    labels[1:] = (labels[1:] + 1) % 10
    for n in (1, 4):
        assert torch.equal(Short(0.1)(model, images[:n], labels[:n]), images[:n])


def test_a_constant_model_is_attacked_without_an_empty_batch():
    class Constant(nn.Module):
        def forward(self, images):
            # `reshape` refuses a batch without images
            return 0 * images.reshape(len(images), -1)[:, :5]

    images = torch.rand(3, 3, 8, 8)
    points = Short(0.1)(Constant(), images, torch.tensor([0, 1, 0]))
    assert torch.equal(points, images)


@pytest.mark.parametrize("kind", ["one", "one per image", "function"])
def test_seed_comes_from_the_generators(kind):
    model = make_model()
    images, labels = make_images(model, 6)

    def attacked(seed):
        generators = torch_generator(seed, "attack")
        if kind == "one per image":
            generators = [torch_generator(seed, "attack", index) for index in range(6)]
        if kind == "function":
            one = generators

            def generators(distribution, shape):
                return distribution((6, *shape), generator=one)

        return Short(0.02)(model, images, labels, generators=generators)

    assert torch.equal(attacked(1), attacked(1))
    assert not torch.equal(attacked(1), attacked(2))


def test_the_default_dtype_changes_nothing():
    model = make_model()
    images, labels = make_images(model, 3)
    expected = Short(0.02)(model, images, labels)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(Short(0.02)(model, images, labels), expected)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_too_few_classes_are_an_error():
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match="at least 4 classes.*the model has 3"):
        AutoAttack(0.1)(make_model(3), images, torch.tensor([0, 1]))


def test_names_its_version():
    attack = AutoAttack(0.1)
    assert attack.version == pyautoattack.__version__
    assert (
        attack.description
        == f"standard AutoAttack (pyautoattack {attack.version}: apgd-ce, apgd-t, fab-t, square)"
    )


def test_missing_package_is_one_line(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyautoattack"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ConfigError) as caught:
        AutoAttack(0.1)
    assert (
        str(caught.value)
        == 'AutoAttack needs the package pyautoattack: pip install -e ".[autoattack]"'
    )
