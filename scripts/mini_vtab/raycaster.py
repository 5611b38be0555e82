"""A small ray caster: ellipsoids, boxes and cylinders on a plane, one light, hard shadows, Lambert and Phong.

A shape is a unit shape (within -1..1 on every axis), scaled, turned and moved. Rays are turned into its frame, and
found distances hold outside too, because a ray's direction is scaled with it and not made a unit vector again.
"""

import dataclasses
import functools
import math

import numpy as np
from PIL import Image

FAR = 1e9
# The number for a ray that meets no shape. It is negative, so it counts from the end of a table with one row per shape.
SKY, FLOOR = -1, -2


def across(function, vectors):
    """Row by row, the sum or the largest of so few columns; numpy's own reductions along a short axis are slow."""
    return functools.reduce(function, vectors.T)


def dot(a, b):
    return across(np.add, a * b)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def upright(yaw):
    """The rotation about the vertical axis."""
    cos, sin = math.cos(yaw), math.sin(yaw)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


# ---- Unit shapes: how far along its direction a ray meets one, and the normal there ---------------------


def round_terms(origin, direction):
    """(a, b, discriminant) of where a ray is at distance 1 from the origin: a t² + 2 b t + c = 0."""
    a, b = dot(direction, direction), dot(origin, direction)
    return a, b, b * b - a * (dot(origin, origin) - 1)


def slabs(origin, direction):
    """Where a ray enters and leaves -1..1, axis by axis."""
    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = (-1 - origin) / direction, (1 - origin) / direction
    return np.minimum(one, other), np.maximum(one, other)


class Ellipsoid:
    @staticmethod
    def distance(origin, direction):
        a, b, discriminant = round_terms(origin, direction)
        near = (-b - np.sqrt(np.maximum(discriminant, 0))) / a
        return np.where(discriminant > 0, near, FAR)

    @staticmethod
    def normal(origin, direction, distance):
        return origin + direction * distance[:, None]


class Box:
    @staticmethod
    def distance(origin, direction):
        enter, leave = slabs(origin, direction)
        enter, leave = across(np.maximum, enter), across(np.minimum, leave)
        return np.where(leave >= enter, enter, FAR)

    @staticmethod
    def normal(origin, direction, _):
        axis = slabs(origin, direction)[0].argmax(1)
        rows = np.arange(len(axis))
        normal = np.zeros_like(direction)
        normal[rows, axis] = -np.sign(direction[rows, axis])
        return normal


class Cylinder:
    @staticmethod
    def side(origin, direction):
        """Where a ray enters and leaves the endless cylinder."""
        a, b, discriminant = round_terms(origin[:, :2], direction[:, :2])
        root = np.sqrt(np.maximum(discriminant, 0))
        return (-b - root) / a, np.where(discriminant > 0, (-b + root) / a, -FAR)

    @staticmethod
    def distance(origin, direction):
        near, far = Cylinder.side(origin, direction)
        bottom, top = slabs(origin, direction)
        enter, leave = np.maximum(near, bottom[:, 2]), np.minimum(far, top[:, 2])
        return np.where(leave >= enter, enter, FAR)

    @staticmethod
    def normal(origin, direction, distance):
        near, _ = Cylinder.side(origin, direction)
        through_side = near > slabs(origin, direction)[0][:, 2]
        around = (origin + direction * distance[:, None]) * [1, 1, 0]
        along = np.array([0, 0, 1.0]) * -np.sign(direction[:, 2:3])
        return np.where(through_side[:, None], around, along)


# ---- The scene ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Shape:
    kind: type
    centre: np.ndarray
    size: np.ndarray
    rotation: np.ndarray
    colour: np.ndarray
    gloss: float


@dataclasses.dataclass
class Look:
    """Camera and light; the floor's colour is the sky's too, a little darker."""

    size: int
    eye: np.ndarray
    target: np.ndarray
    field_of_view: float  # degrees
    light: np.ndarray
    floor: tuple[float, float, float]
    ambient: float


class Scene:
    def __init__(self):
        self.shapes = []

    def add(self, kind, centre, size, rotation, colour, gloss):
        centre, size, colour = (np.asarray(values, float) for values in (centre, size, colour))
        self.shapes.append(Shape(kind, centre, size, rotation, colour, gloss))

    def first_hits(self, origins, directions, normals=None):
        """(distance, number of the shape) for every ray; fills in `normals` where they are wanted."""
        distances, numbers = np.full(len(directions), FAR), np.full(len(directions), SKY)
        for number, shape in enumerate(self.shapes):
            origin = ((origins - shape.centre) @ shape.rotation) / shape.size
            direction = (directions @ shape.rotation) / shape.size
            distance = shape.kind.distance(origin, direction)
            hit = (distance > 1e-3) & (distance < distances)
            distances[hit], numbers[hit] = distance[hit], number
            if normals is not None:
                normal = shape.kind.normal(origin[hit], direction[hit], distance[hit])
                normal = (normal / shape.size) @ shape.rotation.T
                normals[hit] = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
        return distances, numbers

    def render(self, look):
        directions = camera_rays(look)
        normals = np.zeros_like(directions)
        distances, numbers = self.first_hits(np.broadcast_to(look.eye, directions.shape), directions, normals)

        down = directions[:, 2]
        to_floor = np.where(down < -1e-6, -look.eye[2] / np.minimum(down, -1e-6), FAR)
        on_floor = to_floor < distances
        distances = np.where(on_floor, to_floor, distances)
        normals[on_floor], numbers[on_floor] = [0, 0, 1], FLOOR

        points = look.eye + directions * np.minimum(distances, 1e4)[:, None]
        image = self.shade(look, points, normals, directions, numbers)
        image[distances > FAR / 10] = np.asarray(look.floor) * 0.9
        pixels = (image.clip(0, 1) * 255).astype(np.uint8)
        return Image.fromarray(pixels.reshape(look.size, look.size, 3))

    def shade(self, look, points, normals, directions, numbers):
        floor = np.asarray(look.floor)
        colour = np.array([*(shape.colour for shape in self.shapes), floor, floor])[numbers]
        gloss = np.array([*(shape.gloss for shape in self.shapes), 0, 0])[numbers]
        to_light = look.light - points
        light_distance = np.linalg.norm(to_light, axis=1, keepdims=True)
        to_light = to_light / light_distance
        # The ray starts a little above the surface, so that the surface does not shadow itself.
        lit = ~(self.first_hits(points + normals * 1e-2, to_light)[0] < light_distance[:, 0])
        diffuse = np.maximum(dot(normals, to_light), 0) * lit
        half_way = unit(to_light - directions)
        highlight = np.maximum(dot(normals, half_way), 0) ** 40 * gloss * lit
        return colour * (look.ambient + (1 - look.ambient) * diffuse)[:, None] + highlight[:, None]


def camera_rays(look):
    """The directions from the eye through the pixels, row by row."""
    forward = (look.target - look.eye) / np.linalg.norm(look.target - look.eye)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    extent = math.tan(math.radians(look.field_of_view) / 2)
    grid = (np.arange(look.size) + 0.5) / look.size * 2 - 1
    x, y = np.meshgrid(grid * extent, -grid * extent)
    return unit((forward + x[..., None] * right + y[..., None] * up).reshape(-1, 3))
