"""A run as one page, outputs/PROFILE/index.html: `python -m lgap_utils report PROFILE` makes it again.

It opens from a disk. It is made from what a run kept: rows, tables, figures, results.json, executed
notebooks; no model is run. With `published`, no picture of a data set is in it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from lgap_utils.files import write_whole
from lgap_utils.profiles import PROFILES, ROOT, get_profile, output_root
from lgap_utils.results import check_results
from lgap_utils.words import DATA_SETS
from tools.explorer import evaluations
from tools.notebooks import LEFT_OUT, PARTS, as_page, published_form, render
from tools.runner import check_finished, show
from tools.watch import duration

HIDDEN = ("protocol", "architecture in the paper")  # columns; the first stands behind a mark


def title_of(stem: str) -> str:
    """ "06_table3" -> "Table 3 (notebook 06)"."""
    number, _, rest = stem.partition("_")
    words = re.sub(r"(\D)(\d)", r"\1 \2", rest).replace("_", " ")
    return f"{words[:1].upper()}{words[1:]} (notebook {number})"


def facts(out: Path, name: str, notebooks: list[dict]) -> list[tuple[str, str]]:
    """[(what, text)]: settings that differ from the profile's, data, device, time, versions."""
    results, found = check_results(out), {}
    for table, entry in results.items():
        made, own = entry["provenance"], {}
        for field, value in vars(get_profile(name, int(table.removeprefix("table ")))).items():
            if field in made["settings"] and made["settings"][field] != json.loads(json.dumps(value)):
                own[field] = f"{field}={made['settings'][field]} (profile: {value})"
        for what, text in (
            ("settings", ", ".join(own.values()) or "the profile's"),
            ("data", f"{DATA_SETS.get(made['settings']['dataset'])}: {made['images']}"),
            ("device", made["device"]),
            ("commit", (made["commit"] or "not known")[:12]),
            ("software", ", ".join(f"{k} {v}" for k, v in made["versions"].items() if v)),
        ):
            found.setdefault(what, {}).setdefault(text, []).append(table)
    lines = []
    for what, texts in found.items():
        for text, tables in texts.items():
            where = "" if len(texts) == 1 else f" ({', '.join(tables)})"
            lines.append((what, re.sub(r"sha256 (\w{12})\w+", r"sha256 \1", text) + where))
    seconds = [notebook["seconds"] for notebook in notebooks if notebook["seconds"]]
    if seconds:
        lines.append(("time", f"{duration(sum(seconds))}, the last run of each of {len(seconds)} notebooks"))
    return lines


def audits(out: Path) -> list[dict]:
    """The tables/*_audit.csv, with a count of verdicts each."""
    found = []
    for file in sorted(out.glob("tables/*audit*.csv")):
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
        count = Counter(table["verdict"])
        counts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(count.items()))
        rows = table.to_dict("records")
        found.append({"title": title_of(file.stem), "counts": counts, "warns": count["warn"], "rows": rows})
    return found


def tables(out: Path) -> list[dict]:
    found = []
    for file in sorted(out.glob("tables/*.csv")):
        if "audit" in file.stem:
            continue
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
        heads = [head for head in table if head not in HIDDEN]
        if "flags" in heads and set(table["flags"]) <= {"none", "not run"}:
            heads.remove("flags")
        protocols = table["protocol"] if "protocol" in table else [""] * len(table)
        rows = [{"cells": cells, "protocol": p} for cells, p in zip(table[heads].values.tolist(), protocols)]
        csv = file.relative_to(out).as_posix()
        found.append({"title": title_of(file.stem), "csv": csv, "heads": heads, "rows": rows})
    return found


def figures(out: Path) -> list[dict]:
    from PIL import Image

    found = []
    for file in sorted(out.glob("figures/*.png")):
        with Image.open(file) as image:
            width, height = (round(side / 1.5) for side in image.size)  # 150 dpi, shown at 100
        href = file.relative_to(out).as_posix()
        found.append({"href": href, "title": title_of(file.stem), "width": width, "height": height})
    return found


def notebook_pages(out: Path) -> list[dict]:
    """Write pages/*.html of the executed notebooks; returns what the report lists of them."""
    import nbformat

    found = []
    for file in sorted(out.glob("notebooks/*.ipynb")):
        try:
            nb = nbformat.read(file, as_version=4)
            stopped = check_finished(nb)
        except Exception:  # half of a file, or of another kind: the run that left it has said so
            continue
        seconds = nb.metadata.get("papermill", {}).get("duration")
        took = f", {duration(seconds)}" if seconds else ""
        if stopped:
            took += f"; not finished: {stopped}"
        page = out / "pages" / f"{file.stem}.html"
        write_whole(page, as_page(nb))
        found.append({"href": f"pages/{page.name}", "title": file.stem, "took": took, "seconds": seconds})
    return found


def build(out: Path, name: str, published: bool = False, notes: tuple[str, ...] = ()) -> Path:
    """Write out/index.html and what it shows; returns its path.

    published: no picture of a data set is in it. notes: sentences that stand at its top. Raises
    FileNotFoundError for a folder without results.
    """
    if not any(out.glob("tables/*.csv")) and not any(out.glob("notebooks/*.ipynb")):
        raise FileNotFoundError(f"{show(out)} holds no run; ./run_all.sh {name} makes one")
    (out / "pages").mkdir(exist_ok=True)
    for old in out.glob("pages/*.*"):  # of an earlier run; nobody else writes here
        old.unlink()
    notebooks = notebook_pages(out)
    images, sentences = evaluations(out, published)
    page = {
        "audits": audits(out),
        "tables": tables(out),
        "figures": figures(out),
        "notebooks": notebooks,
        "evaluations": images,
        "pictures": [LEFT_OUT] * (published and any(not each["sheet"] for each in images)) + sentences,
        "facts": facts(out, name, notebooks),
    }
    names = {"run": "What was run", "checks": "Checks", "tables": "Tables", "figures": "Figures"}
    names |= {"notebooks": "Notebooks", "images": "Images"}
    there = {"run": True, "checks": page["audits"], "images": True}
    parts = [(id, text, there.get(id, page.get(id))) for id, text in names.items()]
    # "<" is escaped, so that no caption ends the element that holds the data
    data = json.dumps(images, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    words = {"name": name, "about": PROFILES[name].about, "notes": notes, "parts": parts, "where": show(out)}
    words |= {"title": f"lgap: profile {name}", "data": data}
    words["js"] = (PARTS / "explorer.js").read_text(encoding="utf-8")
    write_whole(out / "index.html", render("report.html.j2", **words, **page))
    return out / "index.html"


def publish(source: Path, target: Path, name: str) -> Path:
    """Put the page of the run in `source` into `target`, where its tables, figures and rows are already.

    Its notebooks go with it, and no picture of a data set. Returns the page.
    """
    import nbformat

    (target / "notebooks").mkdir(parents=True, exist_ok=True)
    paths = {str(output_root()): "outputs", str(ROOT): "lgap"}
    for file in sorted(source.glob("notebooks/*.ipynb")):
        nb = published_form(nbformat.read(file, as_version=4), paths)
        write_whole(target / "notebooks" / file.name, (nbformat.writes(nb) + "\n").encode())
    return build(target, name, published=True)


def headline(out: Path) -> Iterator[str]:
    """Two lines on a run that is done: what LGAP keeps, and what the checks say."""
    entries = [e for entry in check_results(out).values() for e in entry["rows"] if e["name"] == "LGAP"]
    natural = [e for e in entries if e["clean_acc"] is not None]
    robust = [e for e in entries if e["robust_acc"] is not None]
    if natural and robust:
        worst = min(robust, key=lambda e: e["robust_acc"])
        yield (
            f"LGAP is right on {natural[0]['clean_acc']} % of clean images (n = {natural[0]['natural_n']}), "
            f"and on {worst['robust_acc']} % under {worst['attack']} (n = {worst['robust_n']}), "
            "the worst that a table has."
        )
    count = Counter(row["verdict"] for audit in audits(out) for row in audit["rows"])
    if count:
        yield "Checks: " + ", ".join(f"{n} {verdict}" for verdict, n in sorted(count.items())) + "."
