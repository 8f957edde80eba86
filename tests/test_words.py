"""Whether a caption names a class: by whole words, alternatives and synonyms."""

import pytest

from lgap_utils.data import CIFAR10_CLASSES, CIFAR100_CLASSES
from lgap_utils.words import SYNONYMS, names_class


@pytest.mark.parametrize(
    "caption, named",
    [
        ("a cat on a mat", "cat"),
        ("A Cat!", "cat"),
        ("the cat's bed", "cat"),
        ("a kitten", "cat"),
        ("a small car", "automobile"),
        ("an aircraft", "airplane"),
        ("a boat at sea", "ship"),
        ("dog-like", "dog"),
        ("a caterpillar", None),
        ("a scat singer", None),
        ("shipping", None),
        ("a carpet", None),
        ("a dogma", None),
        ("", None),
    ],
)
def test_a_caption_names_a_class_by_whole_words(caption, named):
    assert [name for name in CIFAR10_CLASSES if names_class(caption, name)] == ([named] if named else [])


SHARK, KIT = "great white shark, white shark, man-eater", "carpenter's kit, tool kit"


@pytest.mark.parametrize(
    "caption, class_name, named",
    [
        ("an aquarium fish", "aquarium_fish", True),
        ("Aquarium-fish.", "aquarium_fish", True),
        ("a goldfish", "aquarium_fish", True),
        ("a fish in an aquarium", "aquarium_fish", False),
        ("an aquarium with fish", "aquarium_fish", False),
        ("fish", "aquarium_fish", False),
        ("a red bell pepper", "sweet_pepper", True),
        ("a bell and pepper", "sweet_pepper", False),
        ("trees and maple", "maple_tree", False),
        ("a white shark", SHARK, True),
        ("the great white shark", SHARK, True),
        ("a man eater", SHARK, True),
        ("a white boat and a shark", SHARK, False),
        ("a shark", SHARK, False),
        ("a white sharkskin", SHARK, False),
        ("a carpenter's kit", KIT, True),
        ("a tool kit", KIT, True),
        ("a kit", KIT, False),
        ("a cat", "", False),
        ("a cat", "3", False),
        ("a cat", ", ,", False),
        ("", "cat", False),
        ("a Cat", "CAT", True),
    ],
)
def test_a_name_of_several_words_is_named_in_a_row(caption, class_name, named):
    assert names_class(caption, class_name) is named


@pytest.mark.parametrize("classes", [CIFAR10_CLASSES, CIFAR100_CLASSES])
def test_no_synonym_belongs_to_two_classes(classes):
    words = [word for name in classes for word in {name, *SYNONYMS.get(name, ())}]
    assert len(words) == len(set(words))
    for name in classes:
        for word in (name, *SYNONYMS.get(name, ())):
            assert [c for c in classes if names_class(f"a {word}.", c)] == [name]


def test_every_synonym_is_of_a_class_there_is():
    assert set(SYNONYMS) <= {*CIFAR10_CLASSES, *CIFAR100_CLASSES}
