"""Filler for the ruler tasks: harmless sentences without digits and without words in capitals."""

import random

_WHO = (
    "The baker", "A tired courier", "My neighbour", "The youngest gardener", "An old sailor", "The librarian",
    "Our postman", "The choir", "A visiting painter", "The clockmaker", "Her cousin", "The stable boy",
    "A patient angler", "The night porter", "His tailor", "The village teacher",
)  # fmt: skip
_WHAT = (
    "looked for a missing glove", "swept the dry leaves away", "hummed a slow tune",
    "counted the passing boats",
    "mended a wooden gate", "waited for the rain to stop", "read an old newspaper", "fed the grey pigeons",
    "carried a basket of pears", "polished the brass handles", "told a story about winter",
    "opened all the windows", "planted a row of beans", "wrote a long letter", "drank a cup of mint tea",
    "hung the wet coats up",
)  # fmt: skip
_WHERE = (
    "behind the mill", "near the stone bridge", "in the narrow lane", "by the river",
    "under the chestnut tree",
    "on the market square", "beside the chapel", "at the edge of the wood", "in front of the inn",
    "along the canal", "at the back of the shop", "next to the well",
)  # fmt: skip
_WHEN = (
    "before breakfast", "late in the evening", "on a cold morning", "after the fair", "during the holidays",
    "without saying a word", "while the others slept", "as on every other day", "when nobody was looking",
    "for the rest of the afternoon",
)  # fmt: skip
_QUALITY = (
    "amber", "brisk", "crimson", "dusty", "eager", "frosty", "gentle", "hollow", "ivory", "jolly", "keen",
    "lofty", "mellow", "nimble", "opaque", "placid", "quaint", "rustic", "silent", "tawny", "upbeat",
    "velvet",
    "woven", "yonder", "zesty",
)  # fmt: skip
_THING = (
    "anvil", "beacon", "cinder", "drum", "easel", "falcon", "goblet", "harp", "inkwell", "jigsaw", "kettle",
    "lantern", "marble", "needlepoint", "otter", "parasol", "quiver", "ribbon", "saddle", "thimble", "urn",
    "violin", "walnut", "yardstick", "zither",
)  # fmt: skip


def sentence(rng: random.Random) -> str:
    """Draw one of about thirty thousand sentences."""
    return " ".join(rng.choice(part) for part in (_WHO, _WHAT, _WHERE, _WHEN)) + "."


def keys(rng: random.Random, count: int) -> list[str]:
    """Draw different names such as amber-anvil, made of words that no sentence has.

    Raises:
        ValueError: there are fewer names than `count`.
    """
    most = len(_QUALITY) * len(_THING)
    if count > most:
        raise ValueError(f"found {count} needles, expected at most {most}")
    return [
        f"{_QUALITY[index // len(_THING)]}-{_THING[index % len(_THING)]}"
        for index in rng.sample(range(most), count)
    ]
