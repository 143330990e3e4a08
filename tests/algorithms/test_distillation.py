import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import CLASSES, Recorder, assert_equal, convnet

from algorithms.build import build_algorithms
from algorithms.config import AlgorithmsConfig
from algorithms.distillation import Teacher, distillation_loss
from data.errors import InputError

SAME = {"mean": (0.4,) * 3, "std": (0.2,) * 3}


@pytest.fixture
def teacher():
    torch.manual_seed(7)
    return Teacher(convnet(), *SAME.values(), *SAME.values(), sha256="7" * 64)


def algorithms(teacher, **fields):
    config = AlgorithmsConfig.model_validate({"distillation": {"teacher": "here"} | fields, "mixup": {"alpha": 1.0}})
    return build_algorithms(config, 18, 3, teacher)


@given(st.integers(0, 10_000), st.floats(0.5, 20))
def test_the_loss_is_hintons(seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (3 * torch.randn(5, 7, generator=generator) for _ in range(2))
    ours.requires_grad_()
    p, q = (theirs / temperature).softmax(1), (ours / temperature).softmax(1)
    expected = temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
    loss = distillation_loss(ours, theirs, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()  # the gradient is T (q - p) / N, equation 2 of the paper times T^2
    torch.testing.assert_close(ours.grad, temperature * (q - p).detach() / 5, rtol=1e-4, atol=1e-5)
    assert float(distillation_loss(theirs, theirs, temperature)) == pytest.approx(0, abs=1e-5)


def test_a_teacher_sees_its_own_normalisation():
    pixels, network = torch.rand(2, 3, 8, 8), torch.nn.Flatten()
    teacher = Teacher(network, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), (0.5,) * 3, (0.25,) * 3, "")
    normalised = (pixels - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    torch.testing.assert_close(teacher(normalised), ((pixels - 0.5) / 0.25).flatten(1), rtol=1e-4, atol=1e-5)


def test_it_is_the_blend_on_the_mixed_images_and_the_teacher_stays_as_it_was(run, teacher):
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    losses = Recorder("before_backward", lambda state: (state.loss.item(), state.batch, state.outputs.detach()))
    run(algorithms(teacher, alpha=0.3, temperature=2.0), callbacks=(losses,), epochs=1).fit()
    for loss, (images, targets), outputs in losses.values:
        assert targets.shape == (len(images), CLASSES), "mixed"
        labels = torch.nn.functional.cross_entropy(outputs, targets)
        with torch.no_grad():
            taught = distillation_loss(outputs, teacher(images), 2.0)
        assert loss == pytest.approx(float(0.7 * labels + 0.3 * taught), rel=1e-5)
    assert_equal(before, teacher.state_dict())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_run_with_it_resumes_bit_for_bit_and_not_with_another_teacher(run, teacher, tmp_path):
    path = tmp_path / "saved.pt"
    through = run(algorithms(teacher), save={7: path}).fit()
    assert_equal(through, run(algorithms(teacher), load=path).fit())
    plain = run({"mixup": {"alpha": 1.0}}).fit()
    assert any(not torch.equal(through[name], plain[name]) for name in plain)
    other = Teacher(convnet(), *SAME.values(), *SAME.values(), sha256="8" * 64)
    with pytest.raises(InputError, match=r"SHA-256 8{12}, the checkpoint's teacher 7{12}; to resume, use the same"):
        run(algorithms(other), load=path).fit()
