"""clevr_count and clevr_dist: three to ten shapes in CLEVR's colours on a plane, the same scenes for both tasks."""

import math

import numpy as np

from layout import TEST, TRAIN_ALL, Task
from raycaster import Box, Cylinder, Ellipsoid, Look, Scene, upright

COLOURS = (
    np.array(
        [
            [87, 87, 87],
            [173, 35, 35],
            [42, 75, 215],
            [29, 105, 20],
            [129, 74, 25],
            [129, 38, 192],
            [41, 208, 208],
            [255, 238, 51],
        ]
    )
    / 255.0
)
FEWEST, MOST = 3, 10
DISTANCES = 6  # classes of clevr_dist


def free_place(rng, placed, radius):
    """A place that is far enough from the others; None where 60 tries found none."""
    for _ in range(60):
        place = rng.uniform(-3, 3, 2)
        if all(np.hypot(*(place - other)) > radius + width + 0.25 for other, width in placed):
            return place
    return None


def add_shape(rng, scene, place, radius):
    kind = (Ellipsoid, Box, Cylinder)[rng.integers(3)]
    half = radius * 0.72 if kind is Box else radius
    yaw = rng.uniform(0, 2 * np.pi)
    colour = COLOURS[rng.integers(len(COLOURS))]
    gloss = 0.8 if rng.random() < 0.5 else 0.08  # metal or rubber
    scene.add(kind, [*place, half], [half] * 3, upright(yaw), colour, gloss)


def draw_scene(rng):
    """(image, number of shapes, distance of the nearest along the camera's axis)."""
    count = int(rng.integers(FEWEST, MOST + 1))
    scene, placed = Scene(), []
    azimuth = rng.uniform(-0.08, 0.08) - math.pi / 2
    eye = np.array([7.6 * math.cos(azimuth), 7.6 * math.sin(azimuth), 5.2]) + rng.uniform(-0.35, 0.35, 3)
    while len(placed) < count:
        radius = 0.7 if rng.random() < 0.5 else 0.35
        place = free_place(rng, placed, radius)
        if place is not None:
            placed.append((place, radius))
            add_shape(rng, scene, place, radius)
    axis = -eye / np.linalg.norm(eye)
    nearest = min(((np.array([*place, radius]) - eye) * axis).sum() for place, radius in placed)
    look = Look(
        size=96,
        eye=eye,
        target=np.array([0, 0, 0.2]),
        field_of_view=52,
        light=np.array([3.0, -4, 8]) + rng.uniform(-1, 1, 3),
        floor=(0.55, 0.55, 0.55),
        ambient=0.35,
    )
    return scene.render(look), count, nearest


def clevr(_):
    rng = np.random.default_rng(8)
    scenes = [draw_scene(rng) for _ in range(TRAIN_ALL + TEST)]
    # Every class gets equally many training scenes; the test scenes do not influence that.
    nearest = np.array([distance for _, _, distance in scenes[:TRAIN_ALL]])
    borders = np.quantile(nearest, np.arange(1, DISTANCES) / DISTANCES)
    counts = [(image, count - FEWEST) for image, count, _ in scenes]
    distances = [(image, int(np.searchsorted(borders, distance))) for image, _, distance in scenes]
    for name, classes, items in (
        ("clevr_count", [str(count) for count in range(FEWEST, MOST + 1)], counts),
        ("clevr_dist", [f"bin{number}" for number in range(DISTANCES)], distances),
    ):
        yield Task(
            name=name,
            group="structured",
            classes=classes,
            license="own, procedural",
            source="procedural",
            suffix="jpg",
            train=items[:TRAIN_ALL],
            test=items[TRAIN_ALL:],
        )
