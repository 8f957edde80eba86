"""words."""

from __future__ import annotations

# Words that name a class in a caption beside its own name.
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


# ---------------------------------------------------------------- words


def _words(text):
    return " ".join("".join(c if c.isalpha() else " " for c in text.lower()).split())


def names_class(caption, class_name):
    """Whether the caption holds, as whole words in a row, the class's name, one of its alternatives or one of its synonyms.

    Alternatives are separated by commas, words by spaces, hyphens or underscores: "aquarium_fish", "great white shark, white shark".
    """
    caption, names = (
        f" {_words(caption)} ",
        map(_words, (*class_name.split(","), *SYNONYMS.get(class_name, ()))),
    )
    return any(f" {name} " in caption for name in names if name)


# ---------------------------------------------------------------- beside the paper

DATA_SETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet", "toy": "drawn scenes"}
