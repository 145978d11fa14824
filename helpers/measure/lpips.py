"""LPIPS: how far apart two images look, by five layers of AlexNet and a learnt weight a channel.

    d = Σ_l mean over places of w_l · (f_l(a) - f_l(b))²,  f_l of unit length over channels

Zhang et al. (2018), arXiv:1801.03924, version 0.1 of their weights; written out because their
package needs torchvision. The weights are two files that others have published, made into one by

    python -m helpers.measure.lpips alexnet-owt-7be5be79.pth alex.pth lpips.safetensors

of download.pytorch.org/models, and of lpips/weights/v0.1 in the repository PerceptualSimilarity of
github.com/richzhang.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import max_pool2d, relu

from helpers.checks import refuse
from helpers.files import load_tensors, save_tensors

LAYERS = {  # number in torchvision's AlexNet -> what its convolution is made with
    0: {"in_channels": 3, "out_channels": 64, "kernel_size": 11, "stride": 4, "padding": 2},
    3: {"in_channels": 64, "out_channels": 192, "kernel_size": 5, "padding": 2},
    6: {"in_channels": 192, "out_channels": 384, "kernel_size": 3, "padding": 1},
    8: {"in_channels": 384, "out_channels": 256, "kernel_size": 3, "padding": 1},
    10: {"in_channels": 256, "out_channels": 256, "kernel_size": 3, "padding": 1},
}
POOLED = (3, 6)  # before these, the largest of each 3×3 at every second place
SMALLEST = 31  # pixels, from which on a place is left after both
# what the authors scale pixels from -1 to 1 with, near ImageNet's mean and spread
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(torch.nn.Module):
    """The distance, with random weights until `load` gives it the published ones."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.ModuleDict(
            {str(i): torch.nn.Conv2d(**made_with) for i, made_with in LAYERS.items()}
        )
        sizes = [made_with["out_channels"] for made_with in LAYERS.values()]
        self.heads = torch.nn.ParameterList(torch.rand(size) for size in sizes)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    @staticmethod
    def load(path: str | Path, device: str = "cpu") -> "LPIPS":
        """With the weights that `convert` wrote; FileNotFoundError or ValueError names the file."""
        tensors, _ = load_tensors(path)
        made = LPIPS()
        try:
            made.load_state_dict(tensors)
        except RuntimeError:
            refuse("lpips", str(path), "a file that `python -m helpers.measure.lpips` wrote")
        return made.to(device)

    def forward(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Distance of each image from its counterpart, (image,); 0 for the same, seldom above 1.

        Images are (image, height, width, 3) in [0, 1], at least SMALLEST pixels high and wide.
        """
        if a.shape != b.shape or min(a.shape[1:3]) < SMALLEST:
            both = f"{tuple(a.shape)} and {tuple(b.shape)}"
            refuse("images", both, f"of one shape, at least {SMALLEST} pixels high and wide")
        parts = [self._of(x, y) for x, y in zip(_few(a), _few(b))]
        return torch.cat(parts).double().cpu().numpy()

    def _of(self, a, b) -> torch.Tensor:
        layers = zip(self.heads, self._layers(a), self._layers(b))
        return sum((w[:, None, None] * (x - y) ** 2).sum(1).mean((1, 2)) for w, x, y in layers)

    def _layers(self, images):
        """Activations of the five layers, of unit length over channels at every place."""
        x = torch.as_tensor(images).to(self.shift).movedim(-1, 1)
        x = (2 * x - 1 - self.shift) / self.scale
        for i, convolution in self.features.items():
            x = max_pool2d(x, 3, 2) if int(i) in POOLED else x
            x = relu(convolution(x))
            yield x / (x.norm(dim=1, keepdim=True) + 1e-10)


def _few(images, n: int = 32):
    return (images[i : i + n] for i in range(0, len(images), n))


def convert(alexnet: str | Path, heads: str | Path, path: str | Path) -> None:
    """Write one file of torchvision's AlexNet and the authors' five heads, which are theirs."""
    found, own = (torch.load(p, "cpu", weights_only=True) for p in (alexnet, heads))
    try:
        tensors = {name: found[name] for name in LPIPS().state_dict() if "features" in name}
        tensors |= {f"heads.{i}": own[f"lin{i}.model.1.weight"].flatten() for i in range(5)}
    except KeyError as missing:
        refuse("the weights", f"without {missing}", "torchvision's AlexNet, then LPIPS' alex.pth")
    save_tensors(path, tensors, {"lpips": "alex, version 0.1"})


def main() -> None:
    parser = argparse.ArgumentParser("python -m helpers.measure.lpips", description=convert.__doc__)
    for name in ("alexnet", "heads", "path"):
        parser.add_argument(name)
    try:
        convert(**vars(parser.parse_args()))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
