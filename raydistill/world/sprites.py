"""The small world: one shape that moves over a background, with a caption and known truth.

A clip is 16 frames of 32x32 RGB at 8 fps. Everything in it follows from (seed, attributes): the same scene is
drawn on every machine. 36 of the 288 captions, balanced over every attribute, are held out of all training.
The same scene can be drawn finer, 64x64 or more; its numbers stay in pixels of the 32.
"""

import hashlib
import itertools
from dataclasses import asdict, dataclass

import numpy as np

NUM_FRAMES, SIZE, FPS = 16, 32, 8

SHAPES = ("square", "circle", "triangle")
COLOURS = {"red": (220, 50, 50), "green": (50, 180, 70), "blue": (60, 80, 225), "yellow": (235, 205, 50)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS = ("plain", "striped", "shaded")
SPEEDS = {"slowly": (0.45, 0.6), "quickly": (1.0, 1.2)}
"""Pixels per frame, lowest and highest."""

OUTLINE_PX = 1.3


@dataclass(frozen=True)
class Attributes:
    """What a caption says of a clip."""

    shape: str
    colour: str
    direction: str
    background: str
    speed: str

    def caption(self) -> str:
        """Return e.g. 'a red square moves slowly left over a striped background'."""
        moves = f"moves {self.speed} {self.direction}"
        return f"a {self.colour} {self.shape} {moves} over a {self.background} background"

    def image_caption(self) -> str:
        """Return what a single frame shows, e.g. 'a red square over a striped background'."""
        return f"a {self.colour} {self.shape} over a {self.background} background"

    @classmethod
    def parse(cls, caption: str) -> "Attributes":
        """Inverse of `caption`; raises ValueError on any other sentence."""
        words = caption.split()
        if len(words) == 10:
            found = cls(words[2], words[1], words[5], words[8], words[4])
            if found.caption() == caption and found in ALL:
                return found
        raise ValueError(f"not a caption of the small world: {caption!r}")


ALL = tuple(
    Attributes(*values) for values in itertools.product(SHAPES, COLOURS, DIRECTIONS, BACKGROUNDS, SPEEDS)
)


def held_out(attributes: Attributes) -> bool:
    """Whether the caption is kept from all training: one in eight, each attribute's values equally often."""
    shape = SHAPES.index(attributes.shape)
    background = BACKGROUNDS.index(attributes.background)
    colour, direction = list(COLOURS).index(attributes.colour), list(DIRECTIONS).index(attributes.direction)
    speed = list(SPEEDS).index(attributes.speed)
    return (colour + direction) % 4 == (shape + background) % 4 and (colour + shape + background) % 2 == speed


@dataclass(frozen=True)
class Scene:
    """One clip's numbers: attributes and what they leave open. Pixels of SIZE; speed in pixels per frame."""

    attributes: Attributes
    radius: float
    px_per_frame: float
    start: tuple[float, float]
    """Centre at the first frame, (x, y)."""
    shade: tuple[float, float, float]
    """Background colour, RGB 0..255."""
    phase: float
    angle: float

    def centres(self) -> np.ndarray:
        """Centre of the shape in every frame, float64 (frames, 2), (x, y) in pixels."""
        step = np.asarray(DIRECTIONS[self.attributes.direction], dtype=np.float64) * self.px_per_frame
        return np.asarray(self.start) + np.arange(NUM_FRAMES)[:, None] * step

    def truth(self) -> dict[str, object]:
        """Everything known of the clip, ready for JSON."""
        velocity = np.asarray(DIRECTIONS[self.attributes.direction], dtype=np.float64) * self.px_per_frame
        return {
            **asdict(self.attributes),
            "radius": self.radius,
            "velocity": velocity.tolist(),
            "start": list(self.start),
        }


def draw_scene(seed: int, attributes: Attributes | None = None) -> Scene:
    """Draw a scene from a seed; attributes, if not given, uniformly from those not held out.

    The whole path stays inside the frame.
    """
    digest = hashlib.sha256(f"sprites/{seed}".encode()).digest()
    rng = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))
    chosen = TRAINING[int(rng.integers(len(TRAINING)))]
    attributes = attributes or chosen
    radius = float(rng.uniform(4.2, 6.0))
    speed = float(rng.uniform(*SPEEDS[attributes.speed]))
    step = np.asarray(DIRECTIONS[attributes.direction]) * speed
    margin = radius + OUTLINE_PX
    travel = step * (NUM_FRAMES - 1)
    low = margin - np.minimum(travel, 0)
    high = SIZE - 1 - margin - np.maximum(travel, 0)
    middle = (low + high) / 2  # a quick, large shape has a path longer than the room left: centre it
    start = np.where(low < high, rng.uniform(np.minimum(low, middle), np.maximum(high, middle)), middle)
    shade = rng.uniform(70, 150) + rng.uniform(-12, 12, size=3)
    return Scene(
        attributes=attributes,
        radius=radius,
        px_per_frame=speed,
        start=(float(start[0]), float(start[1])),
        shade=(float(shade[0]), float(shade[1]), float(shade[2])),
        phase=float(rng.uniform(0, 1)),
        angle=float(rng.uniform(0, 2 * np.pi)),
    )


TRAINING = tuple(a for a in ALL if not held_out(a))


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to the edge of a centred shape, negative inside, in pixels."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - radius * 0.9
    sides = [(np.sin(a), -np.cos(a)) for a in (np.pi, np.pi / 3, -np.pi / 3)]  # outward normals, tip up
    return np.maximum.reduce([nx * x + ny * y for nx, ny in sides]) - radius * 0.62


def _background(scene: Scene, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Colour field (h, w, 3), still over time."""
    kind, turn = scene.attributes.background, 2 * np.pi * scene.phase
    if kind == "plain":
        level = np.zeros_like(x)
    elif kind == "striped":
        level = 38 * np.tanh(2.5 * np.sin(2 * np.pi * x / 16 + turn))
    else:
        level = (
            55 * (np.cos(scene.angle) * (x - SIZE / 2) + np.sin(scene.angle) * (y - SIZE / 2)) / (SIZE / 2)
        )
    return np.asarray(scene.shade) + level[..., None]


def render(scene: Scene, size: int = SIZE) -> np.ndarray:
    """Draw the clip, anti-aliased by signed distance: uint8 (frames, size, size, 3).

    `size` is a multiple of SIZE, else ValueError is raised. A pixel of SIZE is cut into equal smaller ones;
    edges are one of the new pixels wide.
    """
    fineness = _fineness(size)
    y, x = (np.mgrid[0:size, 0:size] + 0.5) / fineness - 0.5  # a pixel's middle, in the scene's pixels
    centres = scene.centres()
    dx, dy = x[None] - centres[:, 0, None, None], y[None] - centres[:, 1, None, None]
    distance = _distance(scene.attributes.shape, dx, dy, scene.radius)[..., None]
    whole = np.clip(0.5 - fineness * (distance - OUTLINE_PX), 0, 1)  # shape with its outline
    inside = np.clip(0.5 - fineness * distance, 0, 1)
    frame = _background(scene, x, y)[None] * (1 - whole) + 255.0 * (whole - whole * inside)
    frame = frame + np.asarray(COLOURS[scene.attributes.colour], dtype=np.float64) * whole * inside
    return np.clip(np.rint(frame), 0, 255).astype(np.uint8)


def shrink(frames: np.ndarray) -> np.ndarray:
    """Average the smaller pixels of uint8 clips (..., size, size, 3) to those of SIZE, rounded.

    What is measured in a scene's own pixels is so measured in clips of any size. Raises ValueError if `size`
    is no multiple of SIZE.
    """
    fineness, before = _fineness(frames.shape[-2]), frames.shape[:-3]
    if fineness == 1:
        return frames
    parts = frames.reshape(*before, SIZE, fineness, SIZE, fineness, 3)
    return np.rint(parts.mean(axis=(-4, -2), dtype=np.float32)).astype(np.uint8)


def _fineness(size: int) -> int:
    """How many drawn pixels a scene's own pixel is wide."""
    fineness, rest = divmod(size, SIZE)
    if rest or fineness < 1:
        raise ValueError(f"clips of {size} pixels: the side must be a multiple of {SIZE}")
    return fineness
