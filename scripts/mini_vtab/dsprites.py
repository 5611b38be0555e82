"""dsprites_loc and dsprites_ori: one white shape on black, on dSprites' grid of factors, drawn anew."""

import math

import numpy as np
from PIL import Image, ImageDraw

from layout import TEST, TRAIN_ALL, Task

FACTORS = SHAPES, SCALES, ORIENTATIONS, XS, YS = 3, 6, 40, 32, 32
CANVAS, SIZE = 256, 64  # drawn large and scaled down, for smooth edges
CLASSES = 16


def outlines():
    """A square, an ellipse and a heart, around the origin."""
    t = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    square = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.8
    ellipse = np.c_[np.cos(t) * 0.65, np.sin(t) * 1.15]
    heart_y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return square, ellipse, np.c_[16 * np.sin(t) ** 3, heart_y] / 16


OUTLINES = outlines()


def sprite(shape, scale, orientation, x, y):
    angle = orientation * 2 * np.pi / (ORIENTATIONS - 1)
    cos, sin = math.cos(angle), math.sin(angle)
    points = OUTLINES[shape] * 26 * (0.5 + 0.1 * scale)
    points = points @ np.array([[cos, -sin], [sin, cos]]).T
    points = points + np.array([60 + x / (XS - 1) * 136, 60 + y / (YS - 1) * 136])
    canvas = Image.new("L", (CANVAS, CANVAS))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in points], fill=255)
    return canvas.resize((SIZE, SIZE), Image.Resampling.BOX)


def task(name, seed, label):
    """The task of telling `label(orientation, x)` from an image; no two images have the same factors."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(math.prod(FACTORS), TRAIN_ALL + TEST, replace=False)

    def sample(numbers):
        for number in numbers:
            shape, scale, orientation, x, y = (int(factor) for factor in np.unravel_index(number, FACTORS))
            yield sprite(shape, scale, orientation, x, y), label(orientation, x)

    return Task(
        name=name,
        group="structured",
        classes=[str(number) for number in range(CLASSES)],
        license="own, procedural (dSprites factors)",
        source="procedural",
        suffix="png",
        train=sample(chosen[:TRAIN_ALL]),
        test=sample(chosen[TRAIN_ALL:]),
    )


def dsprites_loc(_):
    yield task("dsprites_loc", 118, lambda _, x: x * CLASSES // XS)


def dsprites_ori(_):
    yield task("dsprites_ori", 124, lambda orientation, _: orientation * CLASSES // ORIENTATIONS)
