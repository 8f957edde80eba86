"""Kept rows without the models that made them: tables from rows, attacked images for another defence."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .data import classes_of
from .evaluate import KEY, Evaluation
from .protocols import NATURAL, Attack
from .rows import Frame, Rows, attacked_images
from .tables import Runs, accuracy, as_text, common, ladder, worst_case

if TYPE_CHECKING:
    from .defense import LGAP
    from .images import Images


def _read(folder: Path, key: tuple[str, ...]) -> tuple[Frame, dict[str, Any]] | None:
    """(the rows in a folder, their configuration), whatever made them; None where there are none."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    config = json.loads(file.read_text())
    rows = Rows(folder, config, key).read()
    return (rows, config) if len(rows) else None


def attacks_in(folder: str | Path) -> dict[str, tuple[Attack, Frame, str]]:
    """{name: (attack, its rows, one an image, and the attacked defence's name)} kept in a folder of attacks.

    Attacks of somebody's own classes are left out. Raises ValueError for a folder without attacks.
    """
    found = {}
    for path in sorted(Path(folder).iterdir() if Path(folder).is_dir() else ()):
        kept = _read(path, ("index",))
        if kept and "attack" in kept[1] and "is" not in kept[1]["attack"]:
            attack = Attack(**kept[1]["attack"])
            found[attack.name] = attack, kept[0].assign(folder=str(path)), kept[1]["target"]["name"]
    if not found:
        raise ValueError(f"{folder} holds no rows of attacks; expected a folder as outputs/PROFILE/rows/NAME")
    return found


def runs_in(folder: str | Path) -> tuple[Runs, str, str]:
    """({name: (attack, rows as of `Evaluation.run`)}, the attacked defence, the data set) of kept rows."""
    judged, attacks = {}, attacks_in(folder)
    for name, (attack, rows, _) in attacks.items():
        path, parts = Path(rows["folder"].iloc[0]), []
        for below in sorted(each for each in path.iterdir() if each.is_dir()):
            if scores := _read(below, ("index", "draw")):
                parts.append(scores[0].assign(defence=scores[1]["defence"]["name"]))
        if parts:
            own = rows.drop(columns=["image", "label", "folder"])
            judged[name] = attack, pd.concat(parts).merge(own, on="index", validate="m:1")
    if NATURAL.name not in judged:
        raise ValueError(
            f"{folder} holds no rows of images as they are ({NATURAL.name}); copy that folder too"
        )
    plain = judged.pop(NATURAL.name)[1].rename(columns={"adversarial": "clean", "caption": "caption_clean"})
    runs = {}
    for name, (attack, rows) in judged.items():
        both = rows.merge(plain[[*KEY, "clean", "caption_clean"]], on=KEY)
        runs[name] = attack, both.sort_values(KEY, ignore_index=True)
    _, first, target = next(iter(attacks.values()))
    config = json.loads((Path(first["folder"].iloc[0]) / "config.json").read_text())
    return runs, target, config["dataset"]


def tables_of(folder: str | Path) -> dict[str, Frame]:
    """{title: table} of kept rows: all attacks, mildest first; those in the ball that most of them share on
    their common images, and the worst of these for each image.
    """
    runs, defence, dataset = runs_in(folder)
    runs = {name: run for name, run in runs.items() if defence in set(run[1]["defence"])}
    stand = lambda run: accuracy(run[1][run[1]["defence"] == defence])["%"]
    runs = dict(sorted(runs.items(), key=lambda item: -stand(item[1])))
    ball = lambda attack: (attack.norm, attack.eps_255)
    (most, _), *_ = Counter(ball(attack) for attack, _ in runs.values()).most_common(1)
    alike = {name: run for name, run in runs.items() if ball(run[0]) == most}
    classes, shared = classes_of(dataset), common(alike, defence)
    worst = worst_case(alike, defence)
    last = pd.DataFrame({"% that stand": [as_text(worst)], "n": [worst["n"]]}, index=["the worst of these"])
    tables = {"every attack": ladder(runs, classes, defence)}
    return tables | {"on common images": ladder(shared, classes, defence), "image by image": last}


def score(
    folder: str | Path, defense: LGAP, images: Images, *, n_draws: int = 1, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """{attack: share of its kept attacked images that another defence gets right}, as `tables.proportion`.

    images: at least those that were attacked, from the data set, as rows keep only what changed. The images
    were made against the defence that the rows name, so this is a transfer: no lower bound of an attack.
    Raises ValueError for rows without one of the images, or of other images.
    """
    out = {}
    for name, (_, rows, _) in attacks_in(folder).items():
        wanted = set(rows["index"])
        some = images[[place for place, index in enumerate(images.indices.tolist()) if index in wanted]]
        if len(some) < len(wanted):
            raise ValueError(
                f"images: {len(some)} of the {len(wanted)} that {name!r} attacked are among them"
            )
        judge = Evaluation({"own": defense}, some, folder, config={}, n_draws=n_draws, seed=seed)
        labels = judge.score(defense, attacked_images(rows, some).to(judge.device), some.indices)[1]
        each = zip(some.indices.tolist(), some.labels.tolist(), labels)
        lines = [
            {"index": i, "label": y, "draw": draw, "adversarial": guess}
            for i, y, draws in each
            for draw, guess in enumerate(draws)
        ]
        out[name] = accuracy(pd.DataFrame(lines))
    return out
