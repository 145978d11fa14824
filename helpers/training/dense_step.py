"""One update of a BatchTopK coder by autograd, for losses whose gradients nobody wrote out."""

import torch

from helpers.training.sparse_step import Part, largest


class DenseStep:
    """Called as `SparseStep` is, by one process and in float32.

    The loss is the mean of the FVU over the dictionary's first m latents, m in `prefixes` (shares
    of the width; (1,) is all of it), + aux_coefficient · the auxiliary loss, as in `SparseStep`.
    """

    def __init__(self, coder: torch.nn.Module, config, accelerator=None, prefixes=(1.0,)):
        self.coder, self.sae = coder, getattr(coder, "sae", coder)
        self.aux_coefficient = config.aux_coefficient
        self.ends = sorted({max(1, round(share * self.sae.n_latents)) for share in prefixes})
        self.parameters = tuple(coder.parameters())
        self.optimiser = torch.optim.Adam(self.parameters, lr=config.learning_rate)

    def __call__(self, y, dead, weight: float = 1.0, count: bool = False) -> Part:
        """Add the gradients of weight · loss on a batch y; `dead` holds latents' numbers."""
        sae, target = self.sae, y.reshape(-1, self.sae.d_in)
        pre = sae.preactivations(self.coder.modulated(y) if sae is not self.coder else y)
        cut = largest(pre.detach().flatten(), max(1, round(sae.k * len(pre))))[2]
        z = pre * (pre >= cut)
        spread = (target - target.mean(0)).pow(2).sum()
        error, fvu = target - sae.b_dec, []
        for start, end in zip((0, *self.ends), self.ends):
            error = error - z[:, start:end] @ sae.W_dec[start:end]
            fvu.append(error.pow(2).sum() / spread)
        loss = sum(fvu) / len(fvu)
        if len(dead):
            top = torch.topk(pre[:, dead], min(len(dead), max(1, sae.d_in // 2)), dim=1)
            revived = torch.zeros_like(pre[:, dead]).scatter(1, top.indices, top.values)
            missed = (revived @ sae.W_dec[dead] - error.detach()).pow(2).sum()
            loss = loss + self.aux_coefficient * missed / error.detach().pow(2).sum()
        (weight * loss).backward()
        active = (pre > sae.threshold).sum() if count else 0
        smallest = torch.where(cut > 0, cut, sae.threshold)
        return Part(fvu[-1].detach(), (z > 0).sum(0), smallest, active)

    @torch.no_grad()
    def update(self, learning_rate: float) -> None:
        """One step of Adam; decoder rows keep their norm, so their gradient along them is cut."""
        W = self.sae.W_dec
        W.grad -= (W.grad * W).sum(1, keepdim=True) * W
        self.optimiser.param_groups[0]["lr"] = learning_rate
        self.optimiser.step()
        self.optimiser.zero_grad()
        W /= torch.linalg.vector_norm(W, dim=1, keepdim=True)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value
