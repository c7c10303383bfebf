"""The names of classes: which one a word means, and what a thousand classes are called."""

import pytest

from autoregressive.data.class_names import imagenet_names, names_to_show, read_classes

FRUIT = ["apple", "fig", "Fig", "pear tree", "3"]
# Those that published pictures show, by their indices in the order of ImageNet's folders.
SHOWN = {207: "golden retriever", 360: "otter", 387: "lesser panda", 974: "geyser", 88: "macaw",
         979: "valley", 417: "balloon", 279: "Arctic fox"}


@pytest.mark.parametrize("text, classes", [
    ("pear tree,0", [3, 0]),
    ("PEAR Tree , apple", [3, 0]),
    ("fig,Fig", [1, 2]),                            # as they are written
    ("3,2", [4, 2]),                                # a name before a number
])
def test_a_class_is_named_by_name_or_number(text, classes):
    assert read_classes(text, FRUIT, 5) == classes


@pytest.mark.parametrize("text, recorded, words", [
    ("FIG", FRUIT, "got 'FIG', a name of 1 and 2; give the number"),
    ("0,5", FRUIT, r"indices in 0 \.\. 4 or names such as apple, got '5'$"),
    ("aple", FRUIT, r"got 'aple'; near it are apple \(0\)"),
    ("tree", FRUIT, r"near it are pear tree \(3\)"),
    ("²", FRUIT, "got '²'"),
    ("", FRUIT, "got ''$"),
    ("apple", None, r"0 \.\. 4 \(the checkpoint carries no names\), got 'apple'"),
])
def test_a_word_that_names_no_one_class_is_refused_with_what_is_near(text, recorded, words):
    with pytest.raises(ValueError, match=f"^--class-ids: expected .*{words}"):
        read_classes(text, recorded, 5)


FOLDERS = ["n01440764", *(f"n{number:08}" for number in range(2_000_000, 2_000_998)), "n15075141"]


@pytest.mark.parametrize("recorded", [None, [str(label) for label in range(1000)], FOLDERS],
                         ids=["none", "numbers", "folders"])
def test_a_thousand_classes_without_names_of_their_own_are_those_of_imagenet(recorded):
    names = names_to_show(recorded, 1000)
    assert {label: names[label] for label in SHOWN} == SHOWN
    assert read_classes("Golden Retriever,LESSER panda, 360", recorded, 1000) == [207, 387, 360]
    if recorded:
        assert read_classes(f"{recorded[7]},{recorded[0]}", recorded, 1000) == [7, 0]


def test_names_of_imagenet_that_differ_in_case_alone_are_told_apart_or_refused():
    names = imagenet_names()
    assert len(set(names)) == 1000
    assert [names[label] for label in read_classes("Cardigan,cardigan", None, 1000)] == [
        "Cardigan", "cardigan"]
    with pytest.raises(ValueError, match="a name of 264 and 474; give the number"):
        read_classes("CARDIGAN", None, 1000)


def test_other_classes_are_called_what_is_recorded_or_their_numbers():
    own = [f"kind {label}" for label in range(1000)]
    assert names_to_show(own, 1000) == own
    assert names_to_show(FRUIT, 5) == FRUIT
    assert names_to_show(None, 3) == ["class 0", "class 1", "class 2"]
