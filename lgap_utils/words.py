"""Words: which class a caption names, and what tables call the data sets."""

from __future__ import annotations

from typing import Any

DATA_SETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet", "toy": "drawn scenes"}

# Other words for a class of CIFAR-10 or CIFAR-100 that captioners use.
SYNONYMS = {
    "airplane": ("plane", "aircraft", "jet", "airliner"),
    "automobile": ("car", "sedan", "vehicle"),
    "bird": ("birds",),
    "cat": ("kitten",),
    "deer": ("doe", "stag"),
    "dog": ("puppy",),
    "frog": ("toad",),
    "horse": ("pony",),
    "ship": ("boat",),
    "truck": ("lorry",),
    "aquarium_fish": ("goldfish",),
    "baby": ("infant",),
    "bicycle": ("bike",),
    "cattle": ("cow", "cows", "bull"),
    "chimpanzee": ("chimp",),
    "cockroach": ("roach",),
    "couch": ("sofa",),
    "forest": ("woods",),
    "lawn_mower": ("lawnmower",),
    "motorcycle": ("motorbike",),
    "pickup_truck": ("pickup",),
    "possum": ("opossum",),
    "road": ("street", "highway"),
    "sea": ("ocean",),
    "streetcar": ("tram", "trolley"),
    "sweet_pepper": ("bell pepper", "bell peppers"),
    "telephone": ("phone",),
    "television": ("tv",),
}


def plain_text(text: Any) -> str:
    """Text in one line: what cannot be printed (line ends, control characters, surrogates) is a space."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _words(text: str) -> str:
    """The words of a text in lower case, one space between them."""
    return " ".join("".join(c if c.isalpha() else " " for c in text.lower()).split())


def names_class(caption: str, class_name: str) -> bool:
    """Whether the caption holds, as whole words in a row, a name of the class or one of its `SYNONYMS`.

    class_name: names separated by commas, words by spaces, hyphens or underscores ("white shark, man-eater").
    """
    text = f" {_words(caption)} "
    return any(f" {name} " in text for name in class_names(class_name))


def class_names(class_name: str) -> list[str]:
    """The names of a class in plain words, its own first, then its `SYNONYMS`; see `names_class`."""
    names = [_words(name) for name in (*class_name.split(","), *SYNONYMS.get(class_name, ()))]
    return [name for name in names if name]
