"""A toy town: small street scenes with exact labels, drawn in two looks.

`draw("synthetic", seed)` looks like a game, `draw("real", seed)` like a camera; they differ in
light, colour, texture, haze and noise, not in what the town is made of: a straight street in
one-point perspective, with 15 of the 19 classes of Cityscapes: no lorries, no two-wheelers.
  1. `plan_town` puts objects along a random street;
  2. a `Canvas` with a random camera paints them strip by strip, at three times the size, into
     four layers with the same outlines: colour, label, light (1 = in the sun) and depth;
  3. `shrink` brings the layers to the final size;
  4. `shade_game` or `shade_real` makes the final picture of them.
Only step 4 knows the domain. The domain is part of the seed, so no town is in both domains.

World coordinates are metres: x to the right, y up from the road, z away from the camera.
"""
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

(ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, TRAFFIC_LIGHT, TRAFFIC_SIGN, VEGETATION, TERRAIN,
 SKY, PERSON, _, CAR, _, BUS, TRAIN) = range(17)              # Cityscapes' trainIds

SCALE = 3                   # how much larger the layers are painted
NEAR, FAR = 1.2, 140.0      # where the street begins and ends (metres)

# Sizes in metres: vehicles (width, height, length), barriers (lowest, highest, thickness, colours)
SIZES = {CAR: (1.8, 1.5, 4.2), BUS: (2.5, 3.1, 11.0), TRAIN: (2.5, 3.5, 24.0)}
BARRIERS = {VEGETATION: (1.0, 1.8, 0.9, ((62, 104, 44), (74, 112, 40))),
            WALL: (1.0, 2.2, 0.3, ((170, 120, 96), (172, 166, 156))),
            FENCE: (1.0, 1.7, 0.1, ((140, 98, 62), (84, 92, 98), (205, 200, 190)))}

# Colours, as (red, green, blue)
WHITE, RED, YELLOW, GREEN = (236, 236, 230), (214, 34, 30), (240, 196, 40), (60, 220, 110)
GLASS, BLACK, STEEL, SKIN = (74, 100, 122), (30, 30, 32), (112, 116, 118), (206, 154, 120)
FACADES = ((196, 150, 112), (205, 186, 150), (176, 104, 82), (214, 205, 190), (150, 138, 128),
           (222, 190, 120), (168, 176, 180), (190, 120, 100), (140, 150, 132))
PAINTS = ((190, 40, 38), (215, 165, 50), (40, 80, 150), (225, 225, 228), (60, 62, 68),
          (150, 156, 162), (44, 46, 52), (50, 110, 86), (120, 50, 90))     # cars and clothes


def pick(rng, options):
    """One of `options`, each as likely as the others."""
    return options[int(rng.random() * len(options))]


def tint(colour, factor):
    """A darker (factor < 1) or brighter (factor > 1) colour, as three ints in 0..255."""
    return tuple(min(255, int(channel * factor)) for channel in colour)


class Canvas:
    """A random camera, and the four layers that it paints."""

    def __init__(self, rng, height, width):
        self.size = (SCALE * width, SCALE * height)
        self.focal = SCALE * width * rng.uniform(0.78, 0.95)
        self.eye = rng.uniform(1.35, 1.75)                    # height of the camera (metres)
        self.u0 = SCALE * width * rng.uniform(0.42, 0.58)     # the vanishing point
        self.v0 = SCALE * height * rng.uniform(0.38, 0.45)
        self.sun = pick(rng, (-1, 1))                         # the side where the sun stands
        self.light = {"top": 1.0, "near": 0.72, "left": 0.68 - 0.28 * self.sun,
                      "right": 0.68 + 0.28 * self.sun}        # by where a face looks
        rows = np.maximum(np.arange(SCALE * height) + 0.5 - self.v0, 1e-3)
        ground = np.minimum(self.focal * self.eye / rows, 255).astype(np.uint8)[:, None]
        self.layers = {"colour": Image.new("RGB", self.size),
                       "label": Image.new("L", self.size, SKY),
                       "light": Image.new("L", self.size, 255),
                       "depth": Image.fromarray(np.repeat(ground, SCALE * width, axis=1))}
        self.pens = [ImageDraw.Draw(layer) for layer in self.layers.values()]

    def polygon(self, points, colour=None, label=None, light=None, depth=None):
        """Project world points (metres) to the screen and paint the polygon between them.

        None leaves a layer as it is: only a colour paints a detail, only a light a shadow.
        """
        outline = []
        for x, y, z in points:
            scale = self.focal / max(z, NEAR)
            outline.append((self.u0 + scale * x, self.v0 + scale * (self.eye - y)))
        light, depth = light and int(255 * light), depth and min(255, int(depth))
        for pen, fill in zip(self.pens, (colour, label, light, depth)):
            if fill is not None:
                pen.polygon(outline, fill=fill)

    def patch(self, x0, x1, z0, z1, colour=None, label=None, light=None):
        """Paint a rectangle on the ground (the depth layer has the ground from the start)."""
        self.polygon([(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)], colour, label, light)

    def shadow(self, x0, x1, z0, z1, height):
        """Darken the ground beside something that stands on x0..x1, z0..z1."""
        shift = -0.3 * height * self.sun
        self.patch(x0 + min(shift, 0), x1 + max(shift, 0), z0 - 0.1, z1, light=0.12)

    def panel(self, quad, s0, t0, s1, t1, colour):
        """Paint a detail on a face: s runs 0..1 from its left to its right, t up from below."""
        points = []
        for s, t in ((s0, t0), (s1, t0), (s1, t1), (s0, t1)):
            a, b, c, d = (1 - s) * (1 - t), s * (1 - t), s * t, (1 - s) * t
            points.append([a * p + b * q + c * r + d * u for p, q, r, u in zip(*quad)])
        self.polygon(points, colour)

    def windows(self, quad, columns, rows, wide, low, high, colour):
        """Paint columns x rows windows on a face; wide, low, high are shares of one cell."""
        for row in range(rows):
            for column in range(columns):
                middle = (column + 0.5) / columns
                self.panel(quad, middle - wide / 2 / columns, (row + low) / rows,
                           middle + wide / 2 / columns, (row + high) / rows, colour)

    def solid(self, x0, x1, z0, z1, y0, y1, colour, label, slope=0.0):
        """Paint a box whose top is smaller by `slope` metres at each end.

        Returns the faces that the camera sees, {"top" | "left" | "right" | "near": four points}.
        """
        a, b, near, far = x0 + 0.4 * slope, x1 - 0.4 * slope, z0 + slope, z1 - slope
        quads = {"top": ((a, y1, near), (b, y1, near), (b, y1, far), (a, y1, far)),
                 "left": ((x0, y0, z1), (x0, y0, z0), (a, y1, near), (a, y1, far)),
                 "right": ((x1, y0, z0), (x1, y0, z1), (b, y1, far), (b, y1, near)),
                 "near": ((x0, y0, z0), (x1, y0, z0), (b, y1, near), (a, y1, near))}
        seen = {"top": y1 < self.eye, "left": x0 > 0, "right": x1 < 0, "near": True}
        quads = {name: quad for name, quad in quads.items() if seen[name]}
        for name, quad in quads.items():
            middle = (z0 + z1) / 2 if name != "near" else z0
            self.polygon(quad, colour, label, self.light[name], middle)
        return quads

    def flat(self, x, z, turn=0.0):
        """Two pens for a cut-out figure that stands at (x, z), turned by `turn` radians.

        bar(a0, y0, a1, y1, width, colour, label) paints a thick line, disc(a, y, radius, colour,
        label, light) a round; a counts metres along the figure, y metres up.
        """
        cos, sin = math.cos(turn), math.sin(turn)

        def paint(points, colour, label, light=0.85):
            points = [(x + a * cos, y, z + a * sin) for a, y in points]
            self.polygon(points, colour, label, light, z)

        def bar(a0, y0, a1, y1, width, colour, label):
            scale = width / 2 / math.hypot(a1 - a0, y1 - y0)
            da, dy = (y1 - y0) * scale, (a0 - a1) * scale
            paint(((a0 - da, y0 - dy), (a0 + da, y0 + dy), (a1 + da, y1 + dy),
                   (a1 - da, y1 - dy)), colour, label)

        def disc(a, y, radius, colour, label, light=0.85):
            paint([(a + radius * math.cos(t / 2), y + radius * math.sin(t / 2))
                   for t in range(13)], colour, label, light)

        return bar, disc


# ---- the things in a town: each paints itself on the canvas ----------------------------------

def pave(canvas, rng, street):
    """Grass, pavements, kerbs, the road and everything painted on it."""
    grey = rng.uniform(0.85, 1.15)
    grass, stone, asphalt = (tint(colour, grey) for colour in
                             ((104, 136, 62), (176, 166, 156), (104, 104, 108)))
    canvas.patch(-300, 300, NEAR, 4 * FAR, grass, TERRAIN)
    canvas.solid(-90, 90, FAR, FAR + 1, 0, 7, tint(grass, 0.6), VEGETATION)   # a distant wood
    for side in (-1, 1):
        kerb, verge, front = (side * street[name][side] for name in ("kerb", "verge", "front"))
        canvas.patch(verge, front, NEAR, 4 * FAR, stone, SIDEWALK)
        canvas.patch(kerb, kerb + 0.25 * side, NEAR, 4 * FAR, (206, 200, 190), SIDEWALK)
    left, right, half = -street["kerb"][-1], street["kerb"][1], street["lane"] / 2
    canvas.patch(left, right, NEAR, 4 * FAR, asphalt, ROAD)
    for x in (-3 * half, half):                               # lines at the edges of the lanes
        canvas.patch(x - 0.06, x + 0.06, NEAR, FAR, WHITE)
    for z in np.arange(rng.uniform(NEAR, 5), FAR, 7):         # dashes between the two lanes
        canvas.patch(-half - 0.08, -half + 0.08, z, z + 3, WHITE)


def building(canvas, rng, side, front, z0, z1, height):
    """A house along the street, with windows."""
    colour = tint(pick(rng, FACADES), rng.uniform(0.85, 1.1))
    glass = tint(GLASS, rng.uniform(0.7, 1.3))
    floors, wide = round(height / 3.1), rng.uniform(0.4, 0.62)
    left, right = sorted((side * front, side * (front + 11)))
    canvas.shadow(left, right, z0, z1, 0.7 * height)
    faces = canvas.solid(left, right, z0, z1, 0, height, colour, BUILDING)
    if z0 < 60:
        for name, quad in faces.items():
            columns = 3 if name == "near" else round((z1 - z0) / 2.8)
            canvas.windows(quad, columns, floors, wide, 0.3, 0.76, glass)


def barrier(canvas, rng, side, front, z0, z1, kind):
    """A hedge (kind VEGETATION), WALL or FENCE along a garden."""
    lowest, highest, thick, colours = BARRIERS[kind]
    left, right = sorted((side * front, side * (front + thick)))
    canvas.solid(left, right, z0, z1, 0, rng.uniform(lowest, highest), pick(rng, colours), kind)


def tree(canvas, rng, x, z, size):
    """A trunk and a crown of round clumps, dark below and bright above."""
    green = tint(pick(rng, ((70, 118, 44), (92, 128, 50), (56, 104, 58))), rng.uniform(0.85, 1.15))
    canvas.shadow(x - 0.5 * size, x + 0.5 * size, z - 0.4, z + 0.4, size)
    bar, disc = canvas.flat(x, z)
    bar(0, 0, 0, 1.5 * size, 0.18 * size, (104, 78, 54), VEGETATION)
    for light, lift, spread in ((0.35, 0.0, 0.75), (0.7, 0.3, 0.6), (1.0, 0.65, 0.5)):
        for _ in range(4 if z < 60 else 1):
            disc(size * (rng.uniform(-spread, spread) + 0.15 * canvas.sun),
                 size * (1.55 + lift + rng.uniform(-0.25, 0.25)), size * rng.uniform(0.35, 0.55),
                 green, VEGETATION, light)


def vehicle(canvas, rng, x, z, kind, facing):
    """A CAR, BUS or TRAIN (a tram), of which the camera sees the "front" or the "rear"."""
    w, h, length = (size * rng.uniform(0.95, 1.05) for size in SIZES[kind])
    x0, x1, rear = x - w / 2, x + w / 2, facing == "rear"
    colour = tint(pick(rng, PAINTS if kind == CAR else PAINTS[:3]), 1.05)
    # Its blocks, far ones first: from z, to z, from y, to y, slope, windows per side
    if kind == CAR:
        bonnet, boot = (0.3, 1.2) if rear else (1.2, 0.3)
        blocks = [(0, length, 0.16 * h, 0.58 * h, 0.05, 0),
                  (bonnet, length - boot, 0.57 * h, h, 0.42, 2)]
    else:
        parts, step = (1, length) if kind == BUS else (3, length / 3)
        blocks = [(i * step, (i + 1) * step - 0.3, 0.35, h, 0.06, 6 if kind == BUS else 4)
                  for i in reversed(range(parts))]
    canvas.shadow(x0, x1, z, z + length, h)
    bar, _ = canvas.flat(x, z + 0.3)
    for s in (0.14 - w / 2, w / 2 - 0.14):                    # the wheels at this end
        bar(s, 0, s, 0.5, 0.24, BLACK, kind)
    canvas.solid(x0, x1, z + 0.3, z + length - 0.3, 0.15 * h, 0.25 * h, BLACK, kind)
    for start, end, low, high, slope, count in blocks:
        faces = canvas.solid(x0 + slope / 6, x1 - slope / 6, z + start, z + end, low, high, colour,
                             kind, slope)
        bottom, top = (0.1, 0.86) if kind == CAR else (0.44, 0.84)
        for name, quad in faces.items():
            if count and name != "top":
                canvas.windows(quad, 1 if name == "near" else count, 1, 0.88, bottom, top, GLASS)
    bar, _ = canvas.flat(x, z)                                # lamps and number plate: details
    lamp, y = RED if rear else (255, 250, 220), 0.7 if kind == CAR else 0.9
    for a0, a1, v, paint in ((-0.46, -0.3, y, lamp), (0.3, 0.46, y, lamp),
                             (-0.14, 0.14, y - 0.25, WHITE)):
        bar(a0 * w, v, a1 * w, v, 0.17, paint, None)
    if x0 * x1 > 0 and kind != TRAIN:
        side, radius = (x0 if x0 > 0 else x1), 0.33 if kind == CAR else 0.48
        _, disc = canvas.flat(side, z, math.pi / 2)
        for a in (0.2 * length, 0.8 * length):
            disc(a, radius, radius, BLACK, kind)
            disc(a, radius, 0.5 * radius, STEEL, kind)


def person(canvas, rng, x, z):
    """Somebody on foot."""
    bar, disc = canvas.flat(x, z)
    shirt, trousers = tint(pick(rng, PAINTS), 1.1), tint(pick(rng, PAINTS), 0.9)
    hair, step = pick(rng, ((50, 36, 28), (110, 76, 44), BLACK)), rng.uniform(0.08, 0.26)
    canvas.shadow(x - 0.2, x + 0.2, z - 0.1, z + 0.2, 1.5)
    bar(-step, 0, -0.08, 0.92, 0.17, tint(trousers, 0.8), PERSON)
    bar(step, 0, 0.08, 0.92, 0.17, trousers, PERSON)
    bar(0, 0.82, 0, 1.5, 0.42, shirt, PERSON)
    for side in (-0.24, 0.24):                                # arms
        bar(side, 0.92, 0.9 * side, 1.42, 0.12, tint(shirt, 0.8), PERSON)
    disc(0, 1.67, 0.14, tint(SKIN, rng.uniform(0.6, 1.1)), PERSON)
    disc(0, 1.74, 0.125, hair, PERSON)


def post(canvas, rng, x, z, kind, side):
    """A pole (kind POLE: a street lamp) with what it carries: a TRAFFIC_LIGHT or TRAFFIC_SIGN."""
    top = {POLE: 6.5, TRAFFIC_LIGHT: 2.5, TRAFFIC_SIGN: 2.2}[kind]
    bar, disc = canvas.flat(x, z)
    bar(0, 0, 0, top, 0.14, STEEL, POLE)
    if kind == POLE:
        bar(0, top, -1.5 * side, top + 0.3, 0.14, STEEL, POLE)
    elif kind == TRAFFIC_LIGHT:
        bar(0, top - 0.05, 0, top + 1.05, 0.46, BLACK, kind)
        shining = int(rng.random() * 3)
        for i, lamp in enumerate((GREEN, YELLOW, RED)):
            disc(0, top + 0.17 + 0.33 * i, 0.14, tint(lamp, 1.2 if i == shining else 0.3), kind)
    else:
        disc(0, top + 0.2, 0.4, RED, kind)
        disc(0, top + 0.2, 0.29, WHITE, kind)


# ---- what stands where -----------------------------------------------------------------------

def plan_street(rng):
    """Where lanes, kerbs, pavements and house fronts are: metres to the side of the camera."""
    lane, tram = rng.uniform(3.0, 3.5), rng.random() < 0.14
    kerb = {-1: 1.5 * lane + rng.uniform(0.4, 3.0), 1: 0.5 * lane + rng.uniform(0.4, 3.0)}
    track = -kerb[-1] - 1.7 if tram else 0
    kerb[-1] += 3.4 * tram
    verge = {side: kerb[side] + pick(rng, (0, 0, 1.5)) for side in (-1, 1)}
    front = {side: verge[side] + rng.uniform(3.2, 5.6) for side in (-1, 1)}
    return {"lane": lane, "kerb": kerb, "verge": verge, "front": front, "tram": track}


def plan_lots(rng, front, side):
    """The plots along one side: houses at the pavement, houses and trees behind gardens."""
    things, z, leafy = [], rng.uniform(-4, 5), rng.uniform(0.25, 0.75)
    while z < FAR:
        near, end, garden = max(z, 5), z + rng.uniform(8, 16), 0.0
        if end > 6:                                           # nearer ones are out of sight
            style = rng.random()
            if style < leafy:
                garden = rng.uniform(2, 5)
                kind = pick(rng, (VEGETATION, WALL, FENCE, FENCE))
                things.append((8, near, barrier, (side, front + 0.1, near, end, kind)))
                for at in rng.uniform(near + 1, end, 2):
                    things.append((8.5, at, tree, (side * (front + garden), at,
                                                   rng.uniform(1.2, 2.2))))
            if style > 0.12:                                  # otherwise it is a park
                height = rng.uniform(5.5, 9) if garden else rng.uniform(8, 20)
                things.append((9, near, building, (side, front + garden, near, end, height)))
        z = end + (rng.uniform(1, 4) if rng.random() < 0.3 else 0)
    return things


def plan_traffic(rng, street):
    """What drives in the lanes, parks at the kerbs, and the tram."""
    things = []
    lane, kerb, tram = street["lane"], street["kerb"], street["tram"]
    rows = [(1, 0, "rear", 9, 14), (1, -lane, "front", 9, 14)]           # the two lanes
    rows += [(3, side * (kerb[side] - 1.15), facing, rng.uniform(4, 10), 3)
             for side, facing, inner in ((-1, "front", 1.5), (1, "rear", 0.5))
             if kerb[side] - inner * lane > 1.7 and not (tram and side < 0)]
    for strip, x, facing, z, gap in rows:
        z += rng.exponential(0.5 * gap)
        while z < 90:
            kind = CAR if rng.random() < 0.9 else BUS
            things.append((strip, z, vehicle, (x + rng.uniform(-0.2, 0.2), z, kind, facing)))
            z += SIZES[kind][2] + 1 + rng.exponential(gap)
    if tram:
        z = rng.uniform(8, 30)
        things.append((4, z, vehicle, (tram, z, TRAIN, "front")))
    return things


def plan_pavement(rng, street, side):
    """People, posts and trees on one pavement."""
    things, kerb, front = [], street["kerb"][side], street["front"][side]

    def put(strip, outward, z, paint, *arguments):
        things.append((strip, z, paint, (side * outward, z, *arguments)))

    for _ in range(rng.integers(3, 9)):
        put(6, rng.uniform(kerb + 0.9, front - 0.4), 5 + rng.exponential(14), person)
    for kind, chance in ((TRAFFIC_SIGN, 0.7), (TRAFFIC_LIGHT, 0.5), (TRAFFIC_SIGN, 0.5)):
        if rng.random() < chance:
            put(5, kerb + 0.5, rng.uniform(8, 24), post, kind, side)
    for z in np.arange(rng.uniform(6, 26), 100, 26):
        put(5, kerb + 0.5, z, post, POLE, side)
    if rng.random() < 0.5:
        for z in np.arange(rng.uniform(7, 14), 90, rng.uniform(8, 14)):
            put(5.5, kerb + 0.9, z, tree, rng.uniform(1.3, 2.1))
    return things


def plan_town(rng, street):
    """Everything that stands on the street: (strip, z, paint function, its arguments)."""
    things = plan_traffic(rng, street)
    for side in (-1, 1):
        things += plan_lots(rng, street["front"][side], side) + plan_pavement(rng, street, side)
    things += [(10, FAR, tree, (x, FAR, rng.uniform(2.5, 4.5))) for x in range(-42, 43, 6)]
    # Along one line of sight, what is farther away is also farther to the side.  So the street is
    # painted in strips, from distant trees (10) to the lanes (1), each strip from far to near.
    return sorted(things, key=lambda thing: (-thing[0], -thing[1]))


# ---- from layers to pictures -----------------------------------------------------------------

def shrink(canvas):
    """The layers at the final size: floats [H, W, .] in 0..1 (depth in metres) and the label.

    Colours are averages, as in a camera; the label is the one in the middle of the pixel.
    Returns colour [H, W, 3], light [H, W, 1], depth [H, W, 1], sky share [H, W, 1], label [H, W].
    """
    label = np.asarray(canvas.layers["label"])
    sky = Image.fromarray(np.where(label == SKY, 255, 0).astype(np.uint8))
    colour, light, depth, sky = (
        np.atleast_3d(np.asarray(layer.reduce(SCALE), float)) for layer in
        (canvas.layers["colour"], canvas.layers["light"], canvas.layers["depth"], sky))
    middle = SCALE // 2
    return (colour / 255, light / 255, depth, sky / 255,
            label[middle::SCALE, middle::SCALE])


def saturate(colour, factor):
    """Stronger (factor > 1) or weaker colours."""
    grey = colour.mean(axis=2, keepdims=True)
    return grey + factor * (colour - grey)


def to_bytes(image):
    """Float image in 0..1 to uint8."""
    return (255 * image.clip(0, 1) + 0.5).astype(np.uint8)


def shade_game(canvas, rng):
    """A clean game: bright sun, hard two-tone light, strong warm colours, a blue sky."""
    colour, light, _, sky, label = shrink(canvas)
    sun, shade = np.array([1.2, 1.1, 0.95]), np.array([0.5, 0.5, 0.6])
    image = saturate(colour, 1.3) * (shade + (sun - shade) * light)
    up = np.linspace(1, -1, len(label)).clip(0, 1)[:, None, None]
    blue = np.array([0.7, 0.87, 1.0]) - up * np.array([0.48, 0.37, 0.05])
    # The sky was left black, so that its colour can be added by its share in each pixel.
    return to_bytes(image + sky * blue), label


# How strongly each class is mottled in the real look: (fine grain, blotches).
TEXTURE = np.full((19, 2), (0.05, 0.1))
TEXTURE[[ROAD, SIDEWALK]] = 0.06, 0.09
TEXTURE[[BUILDING, WALL, FENCE]] = 0.1, 0.14
TEXTURE[[VEGETATION, TERRAIN]] = 0.3, 0.28


def noise(rng, size, cell_y, cell_x):
    """Smooth noise [H, W, 1], about -2..2, in blotches; cells in 1/80 of the image height."""
    height, width = size
    cells = 80 / cell_y, 80 / cell_x * width / height
    grid = rng.normal(size=[max(2, round(n)) for n in cells]).astype(np.float32)
    picture = Image.fromarray(grid).resize((width, height), Image.BICUBIC)
    return np.asarray(picture, float)[..., None]


def shade_real(canvas, rng):
    """A camera on a grey day: mottled surfaces, soft light, haze, blur, vignette, noise."""
    colour, light, depth, sky, label = shrink(canvas)
    height, width = label.shape
    grain, blotch = np.split(TEXTURE[label], 2, axis=2)
    on_ground = np.isin(label, (ROAD, SIDEWALK, TERRAIN))[..., None]
    stains = np.where(on_ground, noise(rng, label.shape, 1.2, 12), noise(rng, label.shape, 14, 5))
    texture = grain * noise(rng, label.shape, 1.3, 1.3)
    texture = texture + blotch * (0.6 * noise(rng, label.shape, 4, 4) + 0.8 * stains)
    soft = Image.fromarray(to_bytes(light[..., 0])).filter(ImageFilter.GaussianBlur(height / 60))
    soft = np.asarray(soft, float)[..., None] / 255           # clouds soften every shadow
    image = saturate(colour * np.exp(texture), rng.uniform(0.45, 0.7))
    image = image * (0.4 + 0.6 * soft) * rng.uniform(0.7, 1.0)
    air = np.array([0.62, 0.66, 0.64])
    clouds = 1 + 0.07 * noise(rng, label.shape, 9, 30)
    haze = (1 - np.exp(-depth / rng.uniform(120, 260))) * (1 - sky)
    image = image + haze * (air - image) + sky * rng.uniform(1.25, 1.45) * air * clouds
    y, x = np.linspace(-1, 1, height)[:, None, None], np.linspace(-1, 1, width)[None, :, None]
    image = image * (1 - 0.16 * (x * x + y * y))              # lenses are darker at the edges
    image = image * (np.array([0.93, 1.03, 0.95]) + rng.normal(size=3) * 0.025)
    image = Image.fromarray(to_bytes(0.02 + image))
    image = np.asarray(image.filter(ImageFilter.GaussianBlur(0.3 + height / 800)), float) / 255
    image = image + rng.normal(size=image.shape) * (0.006 + 0.012 * np.sqrt(image))
    return to_bytes(image), label


def draw(domain, seed, size=(80, 160)):
    """Draw one street scene.

    domain: "synthetic" (the game look) or "real" (the camera look); seed: a tuple of ints >= 0,
    which decides everything; size: (height, width), at least (24, 24).
    Returns (image uint8 [H, W, 3] RGB, label uint8 [H, W] with Cityscapes' trainIds).
    The same arguments give the same bytes (with the same versions of numpy and pillow).
    """
    rng = np.random.default_rng([domain == "real", *seed])
    canvas, street = Canvas(rng, *size), plan_street(rng)
    pave(canvas, rng, street)
    for _, _, paint, arguments in plan_town(rng, street):
        paint(canvas, rng, *arguments)
    return (shade_game if domain == "synthetic" else shade_real)(canvas, rng)
