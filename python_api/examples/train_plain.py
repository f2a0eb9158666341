"""Train in a loop of plain PyTorch, and sample."""

import torch
from problem import Field, samples

from fluxmatching import LogUniformNoise, NoiseAnnealedFluxMatching, edm_heun, karras_schedule

STEPS = 100

data = samples(4096, torch.Generator().manual_seed(0))
loss_module = NoiseAnnealedFluxMatching(Field(), LogUniformNoise(0.05, 10.0))
optimizer = torch.optim.Adam(loss_module.parameters(), lr=2e-3)

for step in range(STEPS):
    x = data[torch.randint(len(data), (256,))]
    loss, logged = loss_module(x, seed=step)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

sigmas = karras_schedule(20, 0.05, 10.0)
with torch.no_grad():
    drawn = edm_heun(loss_module.field, sigmas[0] * torch.randn(1000, 2), sigmas)
print(
    f"loss {loss.item():.4g} at sigma {logged['sigma'].item():.3g}; standard deviation of the samples {drawn.std():.3g}"
)
