"""The screen is well-formed for any classes, and a class name survives the way there and back."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from labeling.screen import CLASSES_AT_A_GLANCE, VERDICTS, class_key, class_name, instructions, labeling_screen

STRANGE = [
    "leaf rust",
    '"it\'s"',
    "日本語",
    "<b>&amp;</b>]]>",
    "$image",
    "true",
    "1",
    "a/b%20c",
    "{{idx}}",
    "new\nline",
]


@pytest.mark.parametrize("name", [*STRANGE, "", " ", "class:class:", "😀", "\t"])
def test_a_class_name_comes_back_exactly(name: str) -> None:
    assert class_name(class_key(name)) == name


def test_class_keys_are_plain_and_different() -> None:
    keys = [class_key(name) for name in STRANGE]
    assert len(set(keys)) == len(keys)
    for key in keys:
        assert key.isascii() and not set(key) & set("$<>&\"'{} \n")


def test_what_is_no_class_key_is_refused() -> None:
    for key in ("cat", "", "class:%ff"):
        with pytest.raises(ValueError):
            class_name(key)


@pytest.mark.parametrize("tool", ["bitmask", "brush"])
def test_the_screen_offers_every_class_by_its_key(tool: str) -> None:
    screen = ElementTree.fromstring(labeling_screen(STRANGE, tool))  # type: ignore[arg-type]
    choices = screen.findall(".//Choices[@name='new_class']/Choice")
    assert [class_name(choice.get("alias", "")) for choice in choices] == STRANGE
    assert choices[2].get("value") == "日本語"
    assert not any("$" in choice.get("value", "") for choice in choices)
    assert screen.find(f".//{tool.capitalize()}Labels[@smartOnly='true']") is not None


def test_every_verdict_has_a_key_of_its_own_and_shows_it() -> None:
    screen = ElementTree.fromstring(labeling_screen(["cat", "dog"]))
    choices = screen.findall(".//Choices[@name='verdict']/Choice")
    assert [choice.get("value") for choice in choices] == list(VERDICTS)
    for number, choice in enumerate(choices, start=1):
        assert choice.get("hotkey") == str(number)
        assert choice.get("html", "").startswith(f"<b>{number}</b> ")


def test_no_key_means_two_things_and_none_is_left_to_the_editor() -> None:
    screen = ElementTree.fromstring(labeling_screen([f"class {number}" for number in range(CLASSES_AT_A_GLANCE)]))
    keys = [one.get("hotkey") for tag in ("Choice", "Label") for one in screen.findall(f".//{tag}")]
    assert None not in keys and len(set(keys)) == len(keys)
    assert not {"b", "e", "[", "]"} & set(keys)


def test_many_classes_are_a_list_to_search() -> None:
    many = [f"class {number}" for number in range(CLASSES_AT_A_GLANCE)] + STRANGE
    screen = ElementTree.fromstring(labeling_screen(many))
    assert screen.find(".//Choices[@name='new_class']") is None
    choices = screen.findall(".//Taxonomy[@name='new_class']/Choice")
    assert [class_name(choice.get("alias", "")) for choice in choices] == many


def test_the_instructions_name_every_key_in_both_languages() -> None:
    english, japanese = instructions().split("<h3>やること")
    for number in range(1, len(VERDICTS) + 1):
        assert f"<b>{number}</b>" in english and f"<b>{number}</b>" in japanese


def test_bad_screens_are_refused() -> None:
    for classes in ([], ["cat"], ["cat", "cat"]):
        with pytest.raises(ValueError, match="at least two different classes"):
            labeling_screen(classes)
    with pytest.raises(ValueError, match="choose bitmask or brush"):
        labeling_screen(["cat", "dog"], "pencil")  # type: ignore[arg-type]
