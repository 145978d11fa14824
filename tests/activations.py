"""Made-up activations whose steps predict one another, and a store that needs no folder."""

import torch

S, D = 3, 4


def recorded(n_images=12, seed=0, offset=0.0):
    """Raw activations (image, step, token, channel), each step partly predicted by the last."""
    g = torch.Generator().manual_seed(seed)
    A = 0.5 * torch.randn(D, D, generator=torch.Generator().manual_seed(99))
    h = [torch.randn(n_images, 5, D, generator=g)]
    for _ in range(S - 1):
        h.append(h[-1] @ A + 0.5 * torch.randn(n_images, 5, D, generator=g) + 1)
    return torch.stack(h, 1) * torch.tensor([1.0, 3.0, 10.0])[:, None, None] + offset


def flat(h):
    """(image, step, token, channel) -> (trajectory, step, channel) in float64."""
    return h.transpose(1, 2).flatten(0, 1).double().numpy()


class FakeStore:
    """What training asks of a store, over splits of activations (image, step, token, channel)."""

    def __init__(self, **splits):
        self.splits = splits
        self.n_tokens = next(iter(splits.values())).shape[2]

    def n_images(self, split):
        return len(self.splits[split])

    def batches(self, split, batch_size, seed=0, start=0, share=(0, 1)):
        rows = self.splits[split].transpose(1, 2).flatten(0, 1)
        g = torch.Generator().manual_seed(seed)
        for i in range(10**9):
            batch = rows[torch.randint(len(rows), (batch_size,), generator=g)]
            if i >= start:
                yield batch.chunk(share[1])[share[0]]
