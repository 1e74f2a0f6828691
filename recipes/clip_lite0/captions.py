"""Captions and class prompts for the recipe of clip-lite0 (see train.py).

The ten wordings of the benchmark (UNSEEN in benchmarks/measure_clip_lite0.py) must stay out of
these: no shot, snapshot, frame, camera, jpeg or they.
"""

import numpy as np

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
LEVELS = {  # upper end in EV: adjectives
    -2.3: ["severely underexposed", "almost black", "extremely dark", "three stops underexposed"],
    -1.4: ["strongly underexposed", "very dark", "two stops underexposed", "much too dark"],
    -0.7: ["underexposed", "too dark", "one stop underexposed", "dim", "dark", "poorly lit"],
    -0.3: ["slightly underexposed", "a little dark", "half a stop underexposed", "a bit too dark"],
    0.3: [
        "well-exposed",
        "well exposed",
        "correctly exposed",
        "properly exposed",
        "balanced",
        "normally exposed",
        "perfectly exposed",
        "evenly lit",
        "natural",
    ],
    0.7: ["slightly overexposed", "a little bright", "half a stop overexposed", "a bit too bright"],
    1.4: ["overexposed", "too bright", "one stop overexposed", "bright", "washed out"],
    2.3: ["strongly overexposed", "very bright", "two stops overexposed", "much too bright"],
    99.0: ["severely overexposed", "almost white", "extremely bright", "three stops overexposed"],
}
CLASS_WORDS = (
    ["underexposed", "too dark", "dark", "dim", "very dark", "strongly underexposed", "gloomy",
     "much too dark", "poorly lit", "in need of more light"],
    [*LEVELS[0.3], "normal", "good", "just right", "right", "correct", "well lit", "fine"],
    ["overexposed", "too bright", "bright", "very bright", "strongly overexposed", "glaring",
     "much too bright", "washed out", "in need of less light"],
)  # fmt: skip
TEMPLATES = [
    "a photo with {} lighting",
    "a {} photo",
    "a {} photograph",
    "a {} picture",
    "one {} view of a place",
    "a {} scan",
    "my {} holiday picture",
    "{} pixels",
    "an image that is {}",
    "this photo is {}",
    "this one is {}",
    "the photographer made it {}",
    "the picture looks {}",
    "the image turned out {}",
    "it looks {}",
    "it is {}",
    "everything here is {}",
    "the exposure is {}",
    "{} exposure",
    "{} lighting",
    "{}",
    "exposure: {}",
    "a photo taken with {} light",
    "the scene is {}",
    "the light in this picture is {}",
    "we found this landscape {}",
    "a portrait, {}",
    "the room looks {} to me",
]
CONTENT_TEMPLATES = [
    "a {} photo of a {c}",
    "a photo of a {c}, {}",
    "{c}, {}",
    "a {} {c}",
    "a {c} with {} lighting",
    "the {c} is {}",
    "the {c} in this picture looks {}",
]
CANONICAL_TEMPLATE = "a photo with {} lighting"
CANONICAL = ("underexposed", "well-exposed", "overexposed")


def adjective(ev: float, rng: np.random.Generator) -> str:
    return str(rng.choice(next(words for top, words in LEVELS.items() if ev <= top)))


def caption(image: np.ndarray, ev: float, content: str, look: str, rng: np.random.Generator) -> str:
    """Say in one of many wordings how the photo is exposed, sometimes what is in it.

    image: H,W,3 uint8 RGB.  ev: exposure too much.  content, look: words, "" where unknown.
    """
    words = adjective(ev, rng)
    if content and rng.random() < 0.5:
        text = str(rng.choice(CONTENT_TEMPLATES)).replace("{c}", content).format(words)
    else:
        text = str(rng.choice(TEMPLATES)).format(words)
    luma = image[::4, ::4] @ LUMA
    if ev > 0.7 and (luma > 247).mean() > 0.08 and rng.random() < 0.5:
        text += str(rng.choice([", blown highlights", " with clipped highlights", ", burnt out"]))
    elif ev < -0.7 and (luma < 8).mean() > 0.08 and rng.random() < 0.5:
        text += str(
            rng.choice([", crushed shadows", " with blocked shadows", ", no shadow detail"])
        )
    if look:
        contrast = {"contrasty": ", high contrast", "flat": ", low contrast"}
        text += contrast.get(look, f", {look} colour cast")
    return text


def class_prompts(wordings: int, contents: list[str], rng: np.random.Generator) -> list[str]:
    """`wordings` prompts of each class: the canonical one first, each template over all classes.

    A third of the templates speak of some content, so that unknown nouns do not move the classes.
    """
    templates = [CANONICAL_TEMPLATE]
    while len(templates) < wordings:
        if rng.random() < 0.33:
            content = str(rng.choice(contents))
            templates.append(str(rng.choice(CONTENT_TEMPLATES)).replace("{c}", content))
        else:
            templates.append(str(rng.choice(TEMPLATES)))
    prompts = []
    for label, words in enumerate(CLASS_WORDS):
        prompts.append(templates[0].format(CANONICAL[label]))
        prompts += [t.format(str(rng.choice(words))) for t in templates[1:]]
    return prompts
