"""smallnorb_azi and smallnorb_ele: grey toys of smallNORB's five categories, seen from around and above; the same
images for both tasks."""

import math

import numpy as np

from layout import TEST, TRAIN_ALL, Task
from raycaster import Box, Cylinder, Ellipsoid, Look, Scene, upright

AZIMUTHS, ELEVATIONS = 18, 9
LYING = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0.0]])  # a cylinder on its side, as a wheel


class Toy:
    """Puts shapes into a scene, in a frame whose x axis is the toy's front. No two toys are the same: most lengths are
    drawn from around those given, and every part has its shade of the toy's grey."""

    def __init__(self, rng, scene, azimuth):
        self.rng, self.scene, self.rotation = rng, scene, upright(azimuth)
        self.grey = np.array([rng.uniform(0.45, 0.95)] * 3)
        self.gloss = rng.uniform(0, 0.4)

    def about(self, length, spread=0.18):
        return length * self.rng.uniform(1 - spread, 1 + spread)

    def put(self, kind, centre, size, rotation=None):
        colour = self.grey * self.rng.uniform(0.85, 1.1)
        turned = self.rotation if rotation is None else self.rotation @ rotation
        self.scene.add(kind, self.rotation @ np.asarray(centre, float), size, turned, colour, self.gloss)

    def wheels(self, xs, y, width):
        for x in xs:
            for side in (-y, y):
                self.put(Cylinder, [x, side, 0.22], [0.22, 0.22, width], LYING)


def animal(toy):
    length, width, leg = toy.about(1.0), toy.about(0.36), toy.about(0.55)
    toy.put(Ellipsoid, [0, 0, leg + 0.35], [length, width, toy.about(0.38)])
    head = [length + 0.15, 0, leg + toy.about(0.75)]
    toy.put(Ellipsoid, head, [toy.about(0.34), 0.24, toy.about(0.28)])
    for x in (-0.6, 0.6):
        for y in (-0.22, 0.22):
            toy.put(Cylinder, [x * length, y, leg / 2], [0.11, 0.11, leg / 2])
    toy.put(Ellipsoid, [-length - 0.1, 0, leg + 0.5], [0.3, 0.07, 0.07])


def human(toy):
    leg = toy.about(0.75)
    for y in (0.18, -0.18):
        toy.put(Cylinder, [0, y, leg / 2], [0.14, 0.14, leg / 2])
    toy.put(Ellipsoid, [0, 0, leg + 0.5], [toy.about(0.24), toy.about(0.38), toy.about(0.58)])
    toy.put(Ellipsoid, [0.03, 0, leg + 1.3], [toy.about(0.24), 0.22, 0.26])
    arm = [toy.about(0.35, 0.5), 0.48, leg + 0.6]
    toy.put(Ellipsoid, arm, [toy.about(0.42), 0.11, 0.11])
    toy.put(Ellipsoid, [0, -0.5, leg + 0.45], [0.11, 0.11, toy.about(0.45)])
    toy.put(Box, [0.27, 0, leg + 1.3], [0.08, 0.05, 0.05])


def plane(toy):
    toy.put(Ellipsoid, [0, 0, 0.7], [toy.about(1.3), toy.about(0.22), 0.22])
    wings = [toy.about(0.15, 0.9), 0, 0.7]
    toy.put(Box, wings, [toy.about(0.28), toy.about(1.25), 0.04])
    toy.put(Box, [-1.05, 0, 0.75], [0.16, toy.about(0.45), 0.03])
    toy.put(Box, [-1.1, 0, 1.0], [0.16, 0.03, toy.about(0.3)])


def truck(toy):
    length = toy.about(1.0)
    load = [-0.25, 0, toy.about(0.8)]
    toy.put(Box, load, [length * 0.8, toy.about(0.42), toy.about(0.45)])
    toy.put(Box, [length * 0.8, 0, 0.62], [0.3, 0.4, toy.about(0.38)])
    toy.wheels((-0.7, 0.1, 0.8), 0.42, 0.08)


def car(toy):
    length = toy.about(1.1)
    toy.put(Box, [0, 0, 0.42], [length, toy.about(0.46), toy.about(0.2)])
    toy.put(Ellipsoid, [-0.12 * length, 0, 0.62], [toy.about(0.6), 0.4, toy.about(0.34)])
    toy.wheels((-0.62 * length, 0.62 * length), 0.46, 0.07)


CATEGORIES = animal, human, plane, truck, car


def draw_toy(rng):
    """(image, class of the azimuth, class of the elevation)."""
    category = CATEGORIES[rng.integers(len(CATEGORIES))]
    azimuth, elevation = int(rng.integers(AZIMUTHS)), int(rng.integers(ELEVATIONS))
    scene = Scene()
    category(Toy(rng, scene, math.radians(20 * azimuth)))
    angle, lamp = math.radians(30 + 5 * elevation), rng.integers(6) * math.pi / 3
    look = Look(
        size=96,
        eye=np.array([5.4 * math.cos(angle), 0, 0.6 + 5.4 * math.sin(angle)]),
        target=np.array([0, 0, 0.6]),
        field_of_view=36,
        light=np.array([5 * math.cos(lamp), 5 * math.sin(lamp), 6.0]),
        floor=(0.75, 0.75, 0.75),
        ambient=rng.uniform(0.3, 0.5),
    )
    return scene.render(look).convert("L"), azimuth, elevation


def smallnorb(_):
    rng = np.random.default_rng(9)
    toys = [draw_toy(rng) for _ in range(TRAIN_ALL + TEST)]
    azimuths = [(image, azimuth) for image, azimuth, _ in toys]
    elevations = [(image, elevation) for image, _, elevation in toys]
    for name, classes, items in (("smallnorb_azi", AZIMUTHS, azimuths), ("smallnorb_ele", ELEVATIONS, elevations)):
        yield Task(
            name=name,
            group="structured",
            classes=[str(number) for number in range(classes)],
            license="own, procedural",
            source="procedural",
            suffix="png",
            train=items[:TRAIN_ALL],
            test=items[TRAIN_ALL:],
        )
