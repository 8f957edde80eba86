"""What the report's image explorer shows: the rows of each evaluation, image by image, and their pictures."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lgap_utils.data import at_hand, classes_of, load_images
from lgap_utils.evaluate import attacked_images, folder_name
from lgap_utils.images import Images
from lgap_utils.protocols import Attack
from lgap_utils.rows import Frame, Rows
from lgap_utils.words import DATA_SETS, names_class

COLUMNS, LARGEST = 32, 112  # pictures in a line of a sheet; pixels of one, at most
TITLES = {"table1_and_3": "Tables 1 and 3", "table1_as_it_came": "Table 1, classifier as it came"}


def evaluations(out: Path, published: bool) -> tuple[list[dict], list[str]]:
    """([an entry for each folder of rows], sentences on pictures that are missing).

    Below out/pages lie the pictures, a sheet for each attack. published: only those of drawn scenes.
    """
    entries, notes = [], []
    for folder in sorted(path for path in out.glob("rows/*") if path.is_dir()):
        runs = [run for run in map(read_run, sorted(folder.iterdir())) if run]
        if not runs:
            continue
        dataset = runs[0]["dataset"]
        shown = dataset == "toy" or not published
        clean, why = clean_images(dataset, runs) if shown else (None, "")
        if why:
            notes.append(f"{title_of(folder.name)} has no pictures: {why}.")
        entries.append(entry(out, folder.name, dataset, runs, clean))
    return sorted(entries, key=lambda each: -len(each["rungs"])), list(dict.fromkeys(notes))


def title_of(folder: str) -> str:
    return TITLES.get(folder) or re.sub(r"(\D)(\d)", r"\1 \2", folder.replace("_", " ")).capitalize()


def read_run(folder: Path) -> dict | None:
    """The rows of one attack on one target, and of the undefended classifier; None where there are none."""
    try:
        config = json.loads((folder / "config.json").read_text())
        target, attack = config["target"]["name"], config["attack"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    attacked, scores = read(folder, ("index",)), read(folder / folder_name(target), ("index", "draw"))
    if attacked is None or scores is None:
        return None
    alone = read(folder / "undefended", ("index", "draw"))
    own = {name: value for name, value in attack.items() if name != "is"}
    try:
        protocol = Attack(**own).describe() if "is" not in attack else f"an attack of one's own: {own}"
    except (TypeError, ValueError):  # of another version
        protocol = str(own)
    right = (scores["adversarial"] == scores["label"]).mean()
    return {
        **{"name": attack["name"], "protocol": protocol, "dataset": config["dataset"], "right": right},
        **{"attacked": attacked, "scores": scores, "none": attack.get("optimiser") == "none"},
        "alone": {} if alone is None else dict(zip(alone["index"], alone["adversarial"])),
    }


def read(folder: Path, key: tuple[str, ...]) -> Frame | None:
    """Kept rows of whatever configuration made them; None without one."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    rows = Rows(folder, json.loads(file.read_text()), key).read()
    return rows if len(rows) else None


def clean_images(dataset: str, runs: list[dict]) -> tuple[Images | None, str]:
    """The images that the rows are of, or why they cannot be shown."""
    if not at_hand(dataset):
        return None, f"{DATA_SETS.get(dataset, dataset)} is not at hand; set LGAP_DATA to its folder"
    n = 1 + max(int(run["attacked"]["index"].max()) for run in runs)
    images = load_images(dataset, "test", n)
    try:
        for run in runs:
            attacked_images(run["attacked"][:1], images)
    except ValueError:
        return None, "the rows are of other images than those at hand"
    return images, ""


def sheet(out: Path, name: str, pictures: np.ndarray) -> dict[str, Any]:
    """Write pictures [n, h, w, 3], uint8, into one file; returns what the page needs to cut it up."""
    n, side = len(pictures), min(max(pictures.shape[1:3]), LARGEST)
    columns, rows = min(n, COLUMNS), math.ceil(n / COLUMNS)
    page = Image.new("RGB", (columns * side, rows * side))
    for k, pixels in enumerate(pictures):
        image = Image.fromarray(pixels)
        image = image if image.size == (side, side) else image.resize((side, side))
        page.paste(image, (k % columns * side, k // columns * side))
    file = out / "pages" / f"{name}.{'png' if side <= 64 else 'jpg'}"
    page.save(file)
    return {"file": f"pages/{file.name}", "columns": columns, "rows": rows}


def as_bytes(x: Any) -> np.ndarray:
    """Images [n, 3, h, w] in [0, 1] as [n, h, w, 3], uint8."""
    return (255 * x.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy()


def entry(out: Path, folder: str, dataset: str, runs: list[dict], clean: Images | None) -> dict:
    """One evaluation: its attacks, from none and the mildest to the strongest, and its images."""
    classes = classes_of(dataset)
    runs = sorted(runs, key=lambda run: (not run["none"], -run["right"], run["name"]))
    labels = {}
    for run in runs:
        labels |= dict(zip(run["attacked"]["index"].tolist(), run["attacked"]["label"].tolist()))
    places = {index: place for place, index in enumerate(sorted(labels))}
    images = [{"index": index, "label": labels[index], "under": {}} for index in places]
    rungs, sheets = [], {}
    if clean is not None:
        at = {index: k for k, index in enumerate(clean.indices.tolist())}
        sheets[None] = sheet(out, f"{folder}-clean", as_bytes(clean.x[[at[index] for index in places]]))
        for image in images:
            image["place"] = places[image["index"]]
    for number, run in enumerate(runs):
        for place, (index, own) in enumerate(run["scores"].groupby("index")):
            caption = str(own["caption"].iloc[0])
            images[places[index]]["under"][number] = {
                "caption": caption,
                "named": names_class(caption, classes[labels[index]]),
                "labels": own.sort_values("draw")["adversarial"].tolist(),
                "undefended": run["alone"].get(index),
                "place": place,
            }
        if clean is not None and not run["none"]:
            seen = run["attacked"][run["attacked"]["index"].isin(set(run["scores"]["index"]))]
            pictures = as_bytes(attacked_images(seen, clean))
            sheets[number] = sheet(out, f"{folder}-{folder_name(run['name'])}", pictures)
        stands = f"{100 * run['right']:.1f} % (mean of draws)"
        n = run["scores"]["index"].nunique()
        rung = {"name": run["name"], "protocol": run["protocol"], "n": n, "stands": stands}
        rungs.append(rung | {"sheet": sheets.get(number), "purified": None})
    title = f"{title_of(folder)} ({DATA_SETS.get(dataset, dataset)})"
    return {"title": title, "classes": classes, "rungs": rungs, "images": images, "sheet": sheets.get(None)}
