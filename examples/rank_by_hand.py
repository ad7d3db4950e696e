"""Train by taste: you see six colours, say which you like best, and the model follows (ZO-RankSGD, arXiv 2303.03751).

The model never sees a number from you, only an order. Any model works alike: what `draw` shows could be an image or a text.

python examples/rank_by_hand.py                     # asks you; answer like: 3 1 5
python examples/rank_by_hand.py --wanted 250,120,30 # answers by itself: the nearer to this colour the better
"""

import argparse
from collections.abc import Callable

import torch
from torch import nn

import tare

Colour = tuple[int, int, int]


def draw(model: nn.Module) -> Colour:
    """What the model makes: here one colour."""
    red, green, blue = (255 * torch.sigmoid(model(torch.ones(1, 4)))).round().int().flatten().tolist()
    return red, green, blue


def ask_person(colours: list[Colour], best: int) -> list[int]:
    """Shows colours and reads an order."""
    swatches = [f"\x1b[48;2;{r};{g};{b}m    {number}    \x1b[0m" for number, (r, g, b) in enumerate(colours, 1)]
    print("\n" + " ".join(swatches))
    while True:
        words = input(f"the best {best}, best first: " if best > 1 else "the best: ").split()
        if len(words) >= best and all(word.isdigit() for word in words):
            return [int(word) - 1 for word in words]


def nearest_to(wanted: Colour) -> Callable[[list[Colour], int], list[int]]:
    """Somebody who wants one colour and nothing else."""

    def answer(colours: list[Colour], best: int) -> list[int]:
        distances = [sum((a - b) ** 2 for a, b in zip(colour, wanted, strict=True)) for colour in colours]
        return sorted(range(len(colours)), key=distances.__getitem__)[:best]

    return answer


def main(answer: Callable[[list[Colour], int], list[int]], rounds: int = 8) -> Colour:
    """Ask and follow; returns the last colour."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = tare.ZORank(model, lr=0.6, mu=0.3, m=6, k=3, line_search=4)
    for _ in range(rounds):
        done = False
        while not done:
            candidates = optimizer.ask()
            colours = []
            for candidate in candidates:
                with candidate:  # the model is this candidate here
                    colours.append(draw(model))
            try:
                done = optimizer.tell(answer(colours, optimizer.wanted))
            except tare.InputError as error:  # a number twice, or none of them: ask again
                print(error)
    print("the model's colour now: {},{},{}".format(*draw(model)))
    return draw(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wanted", metavar="R,G,B", type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--rounds", type=int, default=8)
    given = parser.parse_args()
    main(nearest_to(given.wanted) if given.wanted else ask_person, given.rounds)
