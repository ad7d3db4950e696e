"""Make a classifier that can only be queried withstand noise: a denoiser and an encoder in front of it, trained from its answers alone.

The classifier is frozen, and nobody has its gradient. A decoder, learned beforehand without it, belongs to the box, so that what is
estimated is the gradient of 6 numbers a sample instead of 64 (ZO-AE-DS, arXiv 2203.14195).

python examples/defend_black_box.py
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

import tare

SIZE, CODE, CLASSES, NOISE = 64, 6, 5, 1.5


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points [count, SIZE] near a curved surface of few dimensions, and their classes."""
    fixed = torch.Generator().manual_seed(0)
    lift, centres = torch.randn(4, SIZE, generator=fixed), 2.0 * torch.randn(CLASSES, 4, generator=fixed)
    own = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=own)
    return torch.tanh((centres[y] + 0.5 * torch.randn(count, 4, generator=own)) @ lift / 2), y


def fitted(net: nn.Module, loss, steps: int = 300) -> nn.Module:  # type: ignore[no-untyped-def]
    """Trained as usual: what there is before the black box is sealed."""
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(steps):
        opt.zero_grad()
        loss().backward()
        opt.step()
    opt.zero_grad()
    return net.requires_grad_(False)


def main(steps: int = 150) -> tuple[float, float]:
    """Accuracy under noise: the better of the classifier alone and through the autoencoder; and behind what was trained."""
    torch.manual_seed(0)
    x, y = data(2000, 1)
    classifier = nn.Sequential(nn.Linear(SIZE, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    fitted(classifier, lambda: functional.cross_entropy(classifier(x), y))
    encoder, decoder = nn.Linear(SIZE, CODE), nn.Sequential(nn.Linear(CODE, 64), nn.ReLU(), nn.Linear(64, SIZE))
    fitted(nn.ModuleList([encoder, decoder]), lambda: (decoder(encoder(x)) - x).square().mean())

    start = copy.deepcopy(encoder)
    front = nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, SIZE), encoder.requires_grad_())
    box = tare.BlackBox(lambda z: classifier(decoder(z)), "cge")
    opt = tare.ZOAEDS(front, lr=3e-3)
    noise = torch.Generator().manual_seed(2)
    for step in range(steps):
        clean = x[torch.arange(64) + 64 * (step % 31)]
        answers = classifier(clean).argmax(1)  # what it says to the clean ones
        noisy = clean + NOISE * torch.randn(clean.shape, generator=noise)
        opt.step(lambda noisy=noisy, answers=answers: functional.cross_entropy(box(front(noisy)), answers))

    with torch.no_grad():
        fresh, labels = data(2000, 3)
        noisy = fresh + NOISE * torch.randn(fresh.shape, generator=noise)
        alone = float((classifier(noisy).argmax(1) == labels).float().mean())
        untrained = float((classifier(decoder(start(noisy))).argmax(1) == labels).float().mean())
        after = float((box(front(noisy)).argmax(1) == labels).float().mean())
    print(
        f"under noise {alone:.1%} are right alone, {untrained:.1%} through encoder and decoder, {after:.1%} behind what was trained; "
        f"{box.queries:,} samples queried"
    )
    return max(alone, untrained), after


if __name__ == "__main__":
    main()
