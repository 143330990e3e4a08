import pytest
import torch

from data.normalise import Normalise, denormalise

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("kind", [tuple, list])
def test_normalise_is_torchvisions(kind):
    from torchvision.transforms.v2.functional import normalize, to_dtype

    images = torch.randint(0, 256, (5, 3, 7, 9), dtype=torch.uint8).to(memory_format=torch.channels_last)
    before, labels = images.clone(), torch.arange(5)
    out, same = Normalise(MEAN, STD)(kind((images, labels)))
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, normalize(to_dtype(images, torch.float32, scale=True), MEAN, STD))
    assert same is labels
    assert torch.equal(images, before)


def test_denormalise_gives_the_pictures_back():
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    normalised, _ = Normalise(MEAN, STD)((images, None))
    assert torch.equal(denormalise(normalised, MEAN, STD), images)
    assert torch.equal(denormalise(normalised.half(), MEAN, STD).to(int) // 255, images.to(int) // 255)
    assert denormalise(torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1), MEAN, STD)[
        :, 0, 0, 0
    ].tolist() == [0, 255]


def test_the_buffers_follow_the_device():
    normalise = Normalise(MEAN, STD)
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8, device="meta")
    assert normalise((images, None))[0].device.type == "meta"
    assert normalise((torch.zeros(1, 3, 2, 2, dtype=torch.uint8), None))[0].device.type == "cpu"
