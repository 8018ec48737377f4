"""Drawn portraits of fictitious people: 64 by 64 pixels, told apart by twelve attributes.

Small enough for the embedded backbone to learn on two cores, different enough for it to tell 150
people apart, and varied enough in pose and light that a picture is never seen twice.
"""

from dataclasses import dataclass
from typing import Annotated, get_type_hints

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

PORTRAIT_SIZE = 64  # pixels a side
# Portraits are drawn at twice the size and averaged down, since Pillow's shapes have hard edges,
# which would move by whole pixels with the pose.
_CANVAS = 2 * PORTRAIT_SIZE


def _colours(codes: str) -> tuple[Colour, ...]:
    return tuple((code[0], code[1], code[2]) for code in map(bytes.fromhex, codes.split()))


SKIN = _colours("fcdec6 eec6a2 d4a276 ac764e 7a5036 523626")
HAIR = _colours("1c1818 603a22 a86c30 eac872 bc4022 bcbcc4 4a3e98")
IRIS = _colours("482e1c 306ebc 3a8a48 82828a")
CLOTHES = _colours("c62a34 2a48a8 2a8a52 eeeeee 2a2a2e e49622 843e96 7a5c3e")
BACKGROUND = _colours("eaeade 7aaada 8ec68e e4a07a c68ec6 5c667a eed670 7ad0d0")
HEAD_SHAPES = ((30, 38), (36, 36), (27, 42))  # half width and half height, canvas pixels


@dataclass(frozen=True)
class Face:
    """What stays the same over all portraits of one person: indices, each with its bound."""

    skin: Annotated[int, len(SKIN)]
    hair: Annotated[int, len(HAIR)]
    style: Annotated[int, 6]
    eyes: Annotated[int, len(IRIS)]
    glasses: Annotated[int, 3]
    beard: Annotated[int, 3]
    hat: Annotated[int, 3]
    clothes: Annotated[int, len(CLOTHES)]
    collar: Annotated[int, 3]
    background: Annotated[int, len(BACKGROUND)]
    pattern: Annotated[int, 4]
    shape: Annotated[int, len(HEAD_SHAPES)]

    def differences(self, other: "Face") -> int:
        """Number of the twelve attributes in which two faces differ."""
        return sum(getattr(self, name) != getattr(other, name) for name in ATTRIBUTE_SIZES)


ATTRIBUTE_SIZES: dict[str, int] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Face, include_extras=True).items()
}
"""Number of values of each attribute of ``Face``, in its order."""


def random_face(rng: np.random.Generator) -> Face:
    """A face with every attribute drawn uniformly."""
    return Face(**{name: int(rng.integers(size)) for name, size in ATTRIBUTE_SIZES.items()})


@dataclass(frozen=True)
class _Pen:
    """Draws shapes relative to the middle of the head, in canvas pixels."""

    draw: ImageDraw.ImageDraw
    x: float
    y: float

    def box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[float, ...]:
        return (self.x + x0, self.y + y0, self.x + x1, self.y + y1)

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        self.draw.ellipse(self.box(x0, y0, x1, y1), fill=fill)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        self.draw.rectangle(self.box(x0, y0, x1, y1), fill=fill)

    def polygon(self, points: list[tuple[float, float]], fill: Colour) -> None:
        self.draw.polygon([(self.x + x, self.y + y) for x, y in points], fill=fill)


def draw_portrait(face: Face, rng: np.random.Generator, variation: float = 1.0) -> Image.Image:
    """Draw one portrait of ``face``, RGB, 64 by 64 pixels; ``variation`` scales pose and light."""

    def jitter(extent: float) -> float:
        return float(rng.uniform(-extent, extent)) * variation

    background = BACKGROUND[face.background]
    canvas = Image.new("RGB", (_CANVAS, _CANVAS), background)
    draw = ImageDraw.Draw(canvas)
    _draw_pattern(draw, face)
    pen = _Pen(draw, _CANVAS / 2 + jitter(5), _CANVAS * 0.47 + jitter(4))
    scale = 1 + jitter(0.06)
    half_width, half_height = (length * scale for length in HEAD_SHAPES[face.shape])
    _draw_head(pen, face, half_width, half_height)
    turn = jitter(4)
    _draw_features(pen, face, half_width, half_height, turn)
    _draw_hat(pen, face, half_width, half_height)
    canvas = canvas.rotate(jitter(7), Image.Resampling.BILINEAR, fillcolor=background)
    canvas = canvas.resize((PORTRAIT_SIZE, PORTRAIT_SIZE), Image.Resampling.BOX)

    # Brightness, then a cast of colour, then grain: no picture is seen twice.
    pixels_HWC = np.asarray(canvas, dtype=np.float64) * (1 + jitter(0.14))
    pixels_HWC = pixels_HWC * [1 + jitter(0.05) for _ in range(3)]
    pixels_HWC += rng.normal(0.0, 5.0, pixels_HWC.shape)
    return Image.fromarray(np.rint(pixels_HWC.clip(0, 255)).astype(np.uint8))


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (int(channel * factor) for channel in colour)
    return red, green, blue


def _draw_pattern(draw: ImageDraw.ImageDraw, face: Face) -> None:
    """Wall behind the person: plain, vertical or horizontal stripes, or dots."""
    dark = _shade(BACKGROUND[face.background], 0.72)
    if face.pattern == 1:
        for x in range(0, _CANVAS, 20):
            draw.rectangle((x, 0, x + 8, _CANVAS), fill=dark)
    elif face.pattern == 2:
        for y in range(0, _CANVAS, 20):
            draw.rectangle((0, y, _CANVAS, y + 8), fill=dark)
    elif face.pattern == 3:
        for x in range(4, _CANVAS, 24):
            for y in range(4, _CANVAS, 24):
                draw.ellipse((x, y, x + 10, y + 10), fill=dark)


def _draw_head(pen: _Pen, face: Face, w: float, h: float) -> None:
    """Hair behind the head, shoulders with their collar, the head, the hair line."""
    skin, hair, clothes = SKIN[face.skin], HAIR[face.hair], CLOTHES[face.clothes]
    behind = {
        2: (-w - 10, -h - 8, w + 10, h + 4),
        3: (-w - 10, -h - 8, w + 10, h + 26),
        4: (-w - 16, -h - 14, w + 16, h * 0.3),
        5: (-12, -h - 26, 12, -h + 2),
    }
    if face.style in behind:
        pen.ellipse(*behind[face.style], hair)
    pen.rectangle(-10, h - 8, 10, h + 14, _shade(skin, 0.8))
    pen.ellipse(-w - 24, h + 6, w + 24, h + 80, clothes)
    if face.collar == 1:
        pen.polygon([(-16, h + 6), (16, h + 6), (0, h + 30)], skin)
    elif face.collar == 2:
        red, green, blue = clothes
        pen.rectangle(-20, h + 4, 20, h + 16, (255 - red, 255 - green, 255 - blue))
    pen.ellipse(-w, -h, w, h, skin)
    if face.style != 0:
        pen.draw.pieslice(pen.box(-w - 2, -h - 6, w + 2, h * 0.5), 180, 360, fill=hair)
        pen.ellipse(-w * 0.8, -h * 0.55, w * 0.8, h * 0.4, skin)


def _draw_features(pen: _Pen, face: Face, w: float, h: float, turn: float) -> None:
    """Eyes, brows, glasses, nose, beard and mouth; ``turn`` shifts them sideways."""
    skin, hair = SKIN[face.skin], HAIR[face.hair]
    for side in (-1, 1):
        x = side * w * 0.42 + turn
        pen.ellipse(x - 7, -6, x + 7, 6, (255, 255, 255))
        pen.ellipse(x - 4, -4, x + 4, 4, IRIS[face.eyes])
        pen.rectangle(x - 8, -14, x + 8, -11, hair)
        frame = pen.box(x - 12, -11, x + 12, 11)
        if face.glasses == 1:
            pen.draw.ellipse(frame, outline=(22, 22, 22), width=3)
        elif face.glasses == 2:
            pen.draw.rectangle(frame, outline=(190, 32, 32), width=3)
    pen.polygon([(turn, 2), (turn - 5, 14), (turn + 5, 14)], _shade(skin, 0.8))
    if face.beard == 1:
        pen.draw.pieslice(pen.box(-w * 0.95, -h * 0.2, w * 0.95, h), 10, 170, fill=hair)
    elif face.beard == 2:
        pen.rectangle(turn - 12, 15, turn + 12, 19, hair)
    pen.ellipse(turn - 10, 20, turn + 10, 26, (190, 72, 82))


def _draw_hat(pen: _Pen, face: Face, w: float, h: float) -> None:
    if face.hat == 1:
        felt = (52, 52, 62)
        pen.rectangle(-w - 12, -h * 0.72, w + 12, -h * 0.55, felt)
        pen.rectangle(-w * 0.8, -h - 18, w * 0.8, -h * 0.6, felt)
    elif face.hat == 2:
        pen.draw.pieslice(pen.box(-w - 3, -h - 14, w + 3, h * 0.4), 180, 360, fill=(208, 62, 120))
