"""Models whose measured robustness is wrong, each for a different reason."""

import copy

import torch
from torch import nn


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model)


class Saturated(Wrapped):
    def forward(self, x):
        return 1000 * self.model(x)


class Vanishing(Wrapped):
    def forward(self, x):
        return 1e-9 * self.model(x)


class Rounded(Wrapped):
    def forward(self, x):
        return self.model((4 * x).round() / 4)


class Random(Wrapped):
    def forward(self, x):
        return self.model(x) + 0.3 * torch.randn(len(x), 10)


class Softmax(Wrapped):
    def forward(self, x):
        return self.model(x).softmax(1)


class BatchStatistics(Wrapped):
    def forward(self, x):
        z = self.model(x)
        return z - 0.5 * z.mean(0)


class AdaptsItsInput(Wrapped):
    def forward(self, x):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            z = self.model(leaf)
            (grad,) = torch.autograd.grad(z.logsumexp(1).sum() - z.amax(1).sum(), leaf)
        return self.model(x - 0.05 * grad.sign())


class Wavy(Wrapped):
    """Ripples one grey level long: gradients are right at the images, but lead nowhere away from them."""

    def forward(self, x):
        levels = 2 * torch.pi * 16
        return self.model(x + 4 * (levels * x).sin() / levels)


class ChangesItsInput(Wrapped):
    def forward(self, x):
        with torch.no_grad():
            x.clamp_(0.1, 0.9)
        return self.model(x)
