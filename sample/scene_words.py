"""The words of the drawn domain, which the bundled model, its reward and `evaluation.scenes` share."""

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart")
COLOURS = {  # sRGB
    "red": (214, 39, 40),
    "orange": (247, 140, 30),
    "yellow": (245, 215, 50),
    "green": (44, 160, 60),
    "blue": (40, 90, 215),
    "purple": (140, 60, 190),
    "pink": (245, 140, 190),
    "brown": (125, 75, 40),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
COUNTS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis (x, y), sign
RELATION_THRESHOLD = 0.5  # GenEval's
