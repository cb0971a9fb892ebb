"""Render small scenes of textured, shaded objects with captions such as "a red metal ball left of a blue wooden cube".

A scene is a function of its number alone, so that any number of them can be made, anywhere, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

SIZE = 64
SUPERSAMPLING = 2
VIEW = 0.47
"half of the field of view, as a tangent"

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.80, 0.08, 0.07),
    "orange": (0.92, 0.42, 0.05),
    "yellow": (0.93, 0.80, 0.10),
    "green": (0.10, 0.55, 0.15),
    "cyan": (0.10, 0.70, 0.75),
    "blue": (0.08, 0.18, 0.75),
    "purple": (0.42, 0.12, 0.60),
    "pink": (0.93, 0.45, 0.65),
    "white": (0.90, 0.90, 0.90),
    "black": (0.06, 0.06, 0.07),
}
MATERIALS = ("rubber", "metal", "wooden", "striped", "checkered", "spotted")
SHAPES = ("ball", "cube", "cylinder", "cone")
FLOORS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "on grass": ((0.16, 0.42, 0.10), (0.25, 0.55, 0.16)),
    "on sand": ((0.80, 0.68, 0.44), (0.88, 0.78, 0.56)),
    "on a checkered floor": ((0.25, 0.25, 0.28), (0.82, 0.82, 0.80)),
    "on a wooden floor": ((0.42, 0.25, 0.12), (0.58, 0.37, 0.19)),
    "on snow": ((0.82, 0.86, 0.92), (0.93, 0.95, 0.98)),
}
SKIES: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "by day": ((0.80, 0.90, 0.98), (0.35, 0.60, 0.92)),
    "at sunset": ((0.98, 0.66, 0.38), (0.45, 0.32, 0.55)),
    "at night": ((0.14, 0.16, 0.28), (0.02, 0.03, 0.09)),
}
LIGHTS: dict[str, tuple[tuple[float, float, float], float]] = {
    "by day": ((1.0, 0.97, 0.90), 0.42),
    "at sunset": ((1.0, 0.72, 0.48), 0.36),
    "at night": ((0.50, 0.55, 0.75), 0.22),
}
"the color of the light, and the share of it that comes from everywhere"


@dataclass(frozen=True)
class Thing:
    """One object that stands on the floor.

    Attributes:
        shape: One of SHAPES.
        color: A key of COLORS.
        material: One of MATERIALS.
        x: Position to the right.
        z: Position away from the camera.
        radius: Half of its width and of its height.
        turn: Rotation about the vertical axis, in radians.
    """

    shape: str
    color: str
    material: str
    x: float
    z: float
    radius: float
    turn: float

    @property
    def words(self) -> str:
        """The object in words, with its article."""
        article = "an" if self.color[0] in "aeiou" else "a"
        return f"{article} {self.color} {self.material} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects on a floor under a sky, and the caption that says so."""

    things: tuple[Thing, ...]
    floor: str
    sky: str
    light: tuple[float, float, float]
    caption: str


def scene(number: int) -> Scene:
    """Return the scene of a number."""
    rng = np.random.default_rng([20240613, number])
    count = int(rng.choice([1, 2, 3], p=[0.3, 0.45, 0.25]))
    things: list[Thing] = []
    while len(things) < count:
        radius = float(rng.uniform(0.42, 0.62) * {1: 1.4, 2: 1.15, 3: 0.95}[count])
        z = float(rng.uniform(3.3, 4.9))
        thing = Thing(
            shape=str(rng.choice(SHAPES)),
            color=str(rng.choice(list(COLORS))),
            material=str(rng.choice(MATERIALS)),
            x=float(rng.uniform(-0.36, 0.36) * z * (0.4 if count == 1 else 1.0)),
            z=z,
            radius=radius,
            turn=float(rng.uniform(0, math.pi / 2)),
        )
        if all(math.hypot(thing.x - o.x, thing.z - o.z) > 1.05 * (thing.radius + o.radius) for o in things) and all(
            abs(thing.x - o.x) > 0.6 for o in things
        ):
            things.append(thing)
    floor, sky = str(rng.choice(list(FLOORS))), str(rng.choice(list(SKIES), p=[0.5, 0.25, 0.25]))
    side = rng.uniform(0.4, 0.9) * rng.choice([-1, 1])
    light = np.array([side, rng.uniform(0.9, 1.3), rng.uniform(-0.9, -0.3)])
    light = light / np.linalg.norm(light)
    direction = (float(light[0]), float(light[1]), float(light[2]))
    return Scene(tuple(things), floor, sky, direction, _caption(things, floor, sky))


def _caption(things: list[Thing], floor: str, sky: str) -> str:
    """Name the objects from left to right, with how the second and third stand to the one before."""
    ordered = sorted(things, key=lambda thing: thing.x)
    words = [ordered[0].words]
    for before, thing in pairwise(ordered):
        apart = thing.z - before.z
        relation = "behind" if apart < -0.7 else "in front of" if apart > 0.7 else "left of"
        words.append(f"{relation} {thing.words}")
    return f"{' '.join(words)} {floor} {sky}"


def render(number: int, size: int = SIZE) -> NDArray[np.uint8]:
    """Return the picture of a scene, (size, size, 3)."""
    wide = size * SUPERSAMPLING
    what = scene(number)
    across = (np.arange(wide, dtype=np.float32) + 0.5) / wide * 2 - 1
    x, y = np.meshgrid(across, -across)
    # The camera stands 1.5 above the floor and looks a little down.
    tilt = 0.22
    direction = np.stack(
        [VIEW * x, VIEW * y * math.cos(tilt) - math.sin(tilt), math.cos(tilt) + VIEW * y * math.sin(tilt)], -1
    )
    direction = _unit(direction.reshape(-1, 3).astype(np.float32))
    origin = np.broadcast_to(np.array([0.0, 1.5, 0.0], np.float32), direction.shape)
    color = _trace(what, origin, direction, bounces=1)
    picture = np.clip(color, 0, 1) ** (1 / 2.0)
    picture = picture.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3).mean((1, 3))
    return np.asarray(np.rint(picture * 255), np.uint8)


def _trace(what: Scene, origin: Array, direction: Array, bounces: int) -> Array:
    """Return the color that each ray sees, (rays, 3): the nearest object, or the floor, or the sky."""
    nearest = np.full(len(direction), np.inf, np.float32)
    index = np.full(len(direction), -1)
    normal = np.zeros_like(direction)
    for number, thing in enumerate(what.things):
        distance, its_normal = _hit(thing, origin, direction)
        closer = distance < nearest
        nearest[closer], index[closer], normal[closer] = distance[closer], number, its_normal[closer]
    down = np.where(direction[:, 1] < -1e-4, -origin[:, 1] / np.minimum(direction[:, 1], -1e-4), np.inf).astype(
        np.float32
    )
    on_floor = down < nearest
    nearest[on_floor], index[on_floor] = down[on_floor], -2
    normal[on_floor] = (0, 1, 0)

    color = _sky(what, direction)
    seen = np.isfinite(nearest)
    point = origin[seen] + nearest[seen, None] * direction[seen]
    base, shine = _surface(what, index[seen], point)
    facing, towards = normal[seen], np.array(what.light, np.float32)
    lit = np.clip(facing @ towards, 0, None) * ~_shadowed(what, point + 1e-3 * facing, towards)
    tint, ambient = LIGHTS[what.sky]
    light = np.array(tint, np.float32)
    shade = base * light * (ambient * (0.65 + 0.35 * facing[:, 1:2]) + (1.15 - ambient) * lit[:, None])
    mirror = direction[seen] - 2 * (direction[seen] * facing).sum(-1, keepdims=True) * facing
    glow = np.clip(mirror @ towards, 0, None)[:, None] ** 40 * (lit[:, None] > 0) * light
    shade += np.where(shine[:, None] > 0.5, 0.9, 0.12) * glow * (shine[:, None] >= 0)
    metal = shine > 0.5
    if bounces and metal.any():
        reflected = _trace(what, point[metal] + 1e-3 * facing[metal], _unit(mirror[metal]), bounces - 1)
        shade[metal] = 0.45 * shade[metal] + 0.75 * reflected * (0.25 + 0.75 * base[metal])
    fog = np.clip((nearest[seen] - 6) / 14, 0, 1)[:, None]
    color[seen] = shade * (1 - fog) + fog * np.array(SKIES[what.sky][0], np.float32)
    return color


def _unit(vectors: Array) -> Array:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _sky(what: Scene, direction: Array) -> Array:
    low, high = (np.array(color, np.float32) for color in SKIES[what.sky])
    part = np.clip(direction[:, 1:2] * 2.2, 0, 1)
    return low * (1 - part) + high * part


def _shadowed(what: Scene, point: Array, towards: Array) -> NDArray[np.bool_]:
    """Return whether an object stands between a point and the light."""
    rays = np.broadcast_to(towards, point.shape)
    blocked = np.zeros(len(point), bool)
    for thing in what.things:
        blocked |= np.isfinite(_hit(thing, point, rays)[0])
    return blocked


def _local(thing: Thing, vectors: Array) -> Array:
    """Turn vectors into the object's own axes."""
    cos, sin = math.cos(thing.turn), math.sin(thing.turn)
    return np.stack(
        [cos * vectors[:, 0] + sin * vectors[:, 2], vectors[:, 1], cos * vectors[:, 2] - sin * vectors[:, 0]], -1
    )


def _world(thing: Thing, vectors: Array) -> Array:
    cos, sin = math.cos(thing.turn), math.sin(thing.turn)
    return np.stack(
        [cos * vectors[:, 0] - sin * vectors[:, 2], vectors[:, 1], cos * vectors[:, 2] + sin * vectors[:, 0]], -1
    )


def _hit(thing: Thing, origin: Array, direction: Array) -> tuple[Array, Array]:
    """Return the distance to the object along each ray, infinite where there is none, and the normals there."""
    center = np.array([thing.x, thing.radius, thing.z], np.float32)
    local_origin, local = _local(thing, origin - center) / thing.radius, _local(thing, direction) / thing.radius
    with np.errstate(divide="ignore", invalid="ignore"):
        distance, normal = HITS[thing.shape](local_origin, local)
    return distance.astype(np.float32), _world(thing, _unit(normal + 1e-12).astype(np.float32))


def _first(*candidates: tuple[Array, Array]) -> tuple[Array, Array]:
    """Return the nearest of several hits, each (distance or inf, normal)."""
    distance, normal = candidates[0]
    for other, its_normal in candidates[1:]:
        closer = other < distance
        distance, normal = np.where(closer, other, distance), np.where(closer[:, None], its_normal, normal)
    return distance, normal


def _ahead(t: Array, keep: NDArray[np.bool_]) -> Array:
    return np.where(keep & (t > 1e-4), t, np.inf)


def _roots(a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """Return both roots of a t^2 + 2 b t + c, not a number where there are none."""
    root = np.sqrt(b * b - a * c)
    first, second = (-b - root) / a, (-b + root) / a
    return np.minimum(first, second), np.maximum(first, second)


def _ball(o: Array, d: Array) -> tuple[Array, Array]:
    t, _ = _roots((d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - 1)
    return _ahead(t, np.isfinite(t)), o + t[:, None] * d


def _cube(o: Array, d: Array) -> tuple[Array, Array]:
    half = 0.82
    o = o + np.array([0, 1 - half, 0], np.float32)  # so that it stands on the floor
    near, far = (-half * np.sign(d) - o) / d, (half * np.sign(d) - o) / d
    t, axis = near.max(-1), near.argmax(-1)
    normal = np.zeros_like(o)
    rows = np.arange(len(o))
    normal[rows, axis] = -np.sign(d[rows, axis])
    return _ahead(t, t < far.min(-1)), normal


def _disk(o: Array, d: Array, height: float, radius: float, up: float) -> tuple[Array, Array]:
    t = (height - o[:, 1]) / d[:, 1]
    point = o + t[:, None] * d
    inside = point[:, 0] ** 2 + point[:, 2] ** 2 < radius**2
    return _ahead(t, inside), np.broadcast_to(np.array([0, up, 0], np.float32), o.shape)


def _cylinder(o: Array, d: Array) -> tuple[Array, Array]:
    radius = 0.75
    flat, across = o[:, ::2], d[:, ::2]
    t, _ = _roots((across**2).sum(-1), (flat * across).sum(-1), (flat**2).sum(-1) - radius**2)
    point = o + t[:, None] * d
    side = _ahead(t, np.isfinite(t) & (np.abs(point[:, 1]) < 1))
    return _first((side, point * np.array([1, 0, 1], np.float32)), _disk(o, d, 1.0, radius, 1.0))


def _cone(o: Array, d: Array) -> tuple[Array, Array]:
    slope = 0.45  # the radius grows by this from the top, at 1, to the floor, at -1
    top = o - np.array([0, 1, 0], np.float32)
    weights = np.array([1, -(slope**2), 1], np.float32)
    roots = _roots((d * d * weights).sum(-1), (top * d * weights).sum(-1), (top * top * weights).sum(-1))
    hits = []
    for t in roots:
        height = top[:, 1] + t * d[:, 1]
        point = top + t[:, None] * d
        hits.append((_ahead(t, np.isfinite(t) & (height < 0) & (height > -2)), point * weights))
    return _first(*hits)


HITS: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {
    "ball": _ball,
    "cube": _cube,
    "cylinder": _cylinder,
    "cone": _cone,
}


def _surface(what: Scene, index: NDArray[np.int64], point: Array) -> tuple[Array, Array]:
    """Return the color of each point, and how it shines: 1 like metal, 0 like rubber, -1 not at all."""
    color, shine = np.zeros_like(point), np.full(len(point), -1, np.float32)
    floor = index == -2
    color[floor] = _floor(what.floor, point[floor])
    for number, thing in enumerate(what.things):
        mine = index == number
        local = _local(thing, point[mine] - np.array([thing.x, thing.radius, thing.z], np.float32)) / thing.radius
        color[mine] = _material(thing, local)
        shine[mine] = {"metal": 1.0, "wooden": -1.0}.get(thing.material, 0.0)
    return color, shine


def _floor(name: str, point: Array) -> Array:
    first, second = (np.array(color, np.float32) for color in FLOORS[name])
    x, z = point[:, 0], point[:, 2]
    if name == "on a checkered floor":
        part = (np.floor(x * 1.25) + np.floor(z * 1.25)) % 2
    elif name == "on a wooden floor":
        plank = np.floor(x * 1.6)
        part = 0.5 + 0.35 * np.sin(plank * 12.9) + 0.15 * np.sin(z * 7 + plank * 5)
        part = np.where(np.abs(x * 1.6 - plank) < 0.07, -0.8, part)
    else:
        size = 9 if name == "on grass" else 4
        part = 0.5 + 0.25 * (
            np.sin(x * size + 2.1 * np.sin(z * size * 0.7)) + np.sin(z * size * 1.3 + 1.7 * np.sin(x * size))
        )
    return first + np.clip(part, -1, 1)[:, None].astype(np.float32) * (second - first)


def _material(thing: Thing, local: Array) -> Array:
    """Return the color of points of an object, given in its own axes and in units of its radius."""
    base = np.array(COLORS[thing.color], np.float32)
    other = np.array((0.93, 0.92, 0.88) if base.mean() < 0.7 else (0.25, 0.25, 0.28), np.float32)
    x, y, z = local.T
    if thing.material == "wooden":
        ring = 0.5 + 0.5 * np.sin(14 * np.hypot(x + 0.25 * np.sin(3 * y), z * 1.2) + 1.5 * y)
        return base * (0.55 + 0.45 * ring[:, None]).astype(np.float32) + np.array((0.05, 0.03, 0.01), np.float32)
    if thing.material == "striped":
        part = np.floor(y * 2.5) % 2
    elif thing.material == "checkered":
        around = np.arctan2(z, x) / math.pi * 4
        part = (np.floor(around) + np.floor(y * 2.5)) % 2
    elif thing.material == "spotted":
        around = np.arctan2(z, x) / math.pi * 3.5
        part = (np.hypot((around % 1) - 0.5, ((y * 1.6) % 1) - 0.5) < 0.28).astype(np.float32)
    else:
        return np.broadcast_to(base, local.shape)
    return base + part[:, None].astype(np.float32) * (other - base)
