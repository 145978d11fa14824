import numpy as np
import pytest
import torch

from helpers.files import save_tensors
from helpers.measure.lpips import LPIPS, SMALLEST, convert

SIZE = (3, 40, 56, 3)


@pytest.fixture(scope="module")
def lpips():
    torch.manual_seed(0)
    return LPIPS()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((2, *SIZE), np.float32)


def alexnet():
    """The convolutions of AlexNet as torchvision lists them, ReLUs and poolings between."""
    nn = torch.nn
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    )


def naive(features, heads, a, b):
    """One pair of images, place by place."""
    taps, found = [], 0.0
    for image in (a, b):
        x = torch.from_numpy(image).permute(2, 0, 1)[None] * 2 - 1
        x = x - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        x = x / torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        after = []
        for layer in features:
            x = layer(x)
            if isinstance(layer, torch.nn.ReLU):
                after.append(x[0].detach().numpy())
        taps.append(after)
    for w, x, y in zip(heads, *taps):
        places = []
        for row in range(x.shape[1]):
            for column in range(x.shape[2]):
                u, v = x[:, row, column], y[:, row, column]
                u, v = u / (np.linalg.norm(u) + 1e-10), v / (np.linalg.norm(v) + 1e-10)
                places.append((w * (u - v) ** 2).sum())
        found += np.mean(places)
    return found


def test_the_distance_is_that_of_a_second_implementation(lpips, images):
    features = alexnet()
    features.load_state_dict({k[9:]: v for k, v in lpips.state_dict().items() if "feat" in k})
    heads = [head.numpy() for head in lpips.heads]
    expected = [naive(features, heads, a, b) for a, b in zip(*images)]
    found = lpips(*images)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found.shape == (3,) and (found > 0).all()


def test_an_image_is_at_no_distance_from_itself_and_as_far_as_it_is_from_the_other(lpips, images):
    a, b = images
    assert lpips(a, a) == pytest.approx(np.zeros(3), abs=1e-12)
    np.testing.assert_allclose(lpips(a, b), lpips(b, a), rtol=1e-5)
    halfway = lpips(a, (a + b) / 2)
    assert (halfway < lpips(a, b)).all()


def test_images_are_measured_each_alone_however_many(lpips, images):
    many = [np.tile(side, (12, 1, 1, 1))[:35] for side in images]
    np.testing.assert_allclose(lpips(*many)[32:], lpips(*(m[32:] for m in many)), rtol=1e-5)


def test_images_too_small_for_five_layers_are_refused(lpips):
    few = np.zeros((1, SMALLEST, SMALLEST, 3), np.float32)
    assert lpips(few, few) == 0
    with pytest.raises(ValueError, match="images is .*at least 31 pixels"):
        lpips(few[:, 1:], few[:, 1:])
    with pytest.raises(ValueError, match="images is .*of one shape"):
        lpips(few, np.zeros((1, 40, 40, 3), np.float32))


def test_published_files_become_one_that_loads(lpips, images, tmp_path):
    made_of = lpips.state_dict()
    whole = {k: v for k, v in made_of.items() if "features" in k}
    torch.save(whole | {"classifier.1.weight": torch.zeros(2)}, tmp_path / "alexnet.pth")
    heads = {f"lin{i}.model.1.weight": w.view(1, -1, 1, 1) for i, w in enumerate(lpips.heads)}
    torch.save(heads, tmp_path / "alex.pth")
    convert(tmp_path / "alexnet.pth", tmp_path / "alex.pth", tmp_path / "lpips.safetensors")
    again = LPIPS.load(tmp_path / "lpips.safetensors")
    np.testing.assert_array_equal(again(*images), lpips(*images))
    with pytest.raises(ValueError, match="torchvision's AlexNet, then"):
        convert(tmp_path / "alex.pth", tmp_path / "alexnet.pth", tmp_path / "other")


def test_a_file_of_other_weights_is_named(tmp_path):
    save_tensors(tmp_path / "w.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="lpips is '.*w.safetensors'.*helpers.measure.lpips"):
        LPIPS.load(tmp_path / "w.safetensors")


def test_the_distance_is_that_of_the_authors_package(lpips, images):
    try:
        import lpips as theirs
    except (ImportError, RuntimeError) as error:  # a torchvision that does not suit torch
        pytest.skip(f"package lpips, with torchvision, cannot be imported here ({error})")
    reference = theirs.LPIPS(net="alex", pnet_rand=True, verbose=False)  # its heads, no download
    ours = LPIPS()
    layers = dict(reference.net.named_parameters())
    state = {f"features.{k.split('.', 1)[1]}": v for k, v in layers.items()}
    weights = reference.state_dict()
    state |= {f"heads.{i}": weights[f"lin{i}.model.1.weight"].flatten() for i in range(5)}
    ours.load_state_dict(state)
    a, b = (torch.from_numpy(side).permute(0, 3, 1, 2) for side in images)
    with torch.no_grad():
        expected = reference(a, b, normalize=True).flatten().numpy()
    np.testing.assert_allclose(ours(*images), expected, rtol=1e-4)
