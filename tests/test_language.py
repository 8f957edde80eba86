"""Notebook 08's arms: only the words or the guidance differ; its sentences hold the numbers of the rows."""

import pandas as pd
import torch
from made_rows import rows_of

from lgap_utils import language
from lgap_utils.noise import Keys
from lgap_utils.tables import paired
from lgap_utils.words import names_class


def test_in_an_arm_nothing_but_the_words_or_the_guidance_differs(defense, images):
    few = images[:3]
    arms, keys = language.arms(defense, few), Keys(few.indices)
    said = {name: arm.caption(few.x, keys) for name, arm in arms.items()}
    truth = [few.classes[label] for label in few.labels]
    assert all(names_class(text, name) for text, name in zip(said["the true class"], truth))
    assert not any(names_class(text, name) for text, name in zip(said["a wrong class"], truth))
    assert said["another image's caption"] == said["LGAP"][1:] + said["LGAP"][:1]
    assert said["the same words for all"] == [language.AGNOSTIC] * 3
    with torch.no_grad():
        for name in ("a wrong class", "the true class"):
            expected = defense.purify(few.x, said[name], keys)
            assert torch.equal(arms[name].purify(few.x, keys=keys), expected)
        scale = defense.purifier.guidance_scale
        assert f"guidance {scale:g}" not in arms and arms["guidance 15"].purifier.guidance_scale == 15
        with defense.purifier.using(guidance_scale=15.0):
            guided = defense.purify(few.x, keys=keys)
        assert torch.equal(arms["guidance 15"].purify(few.x, keys=keys), guided)
        assert defense.purifier.guidance_scale == scale
    assert all(arm.classifier is defense.classifier for arm in arms.values())


def test_the_answer_says_what_the_rows_say():
    def rows(**right):
        return pd.concat(
            rows_of([[0, 0]] * k + [[1, 1]] * (8 - k), defence=name) for name, k in right.items()
        )

    arms = {"LGAP": 6, "no caption": 4, "the true class": 8, "a wrong class": 1}
    blind, caption, joint = rows(**arms), rows(**arms | {"LGAP": 2}), rows(**arms | {"LGAP": 0})
    first, second, third = language.answer(blind, caption, joint)
    interval = paired(blind, "LGAP", "no caption")["95 % interval"]
    assert "+0.0 points" in first and f"+25.0 points ({interval}), n = 8 under a blind" in first
    assert second.index("-25.0 points") < second.index("-50.0 points")
    assert third.index("+25.0 points") < third.index("-62.5 points")
