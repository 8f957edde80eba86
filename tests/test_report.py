"""The page of a run: made of its rows, safe to open from a disk, the same for a keyboard and a telephone."""

import base64
import io
import json
import shutil

import nbformat
import numpy as np
import pytest
from browser import chromium, opened
from made_rows import CAPTION
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lgap_utils import data
from lgap_utils.evaluate import folder_name
from lgap_utils.profiles import ROOT
from lgap_utils.protocols import NATURAL, get_attack
from lgap_utils.rows import Rows, known_images, packed
from tools import cli, notebooks, report

IMAGES = data.load_images("toy", "test", 24)
NAMES = data.classes_of("toy")
MILD, HARD = get_attack("blind PGD-40"), get_attack("BPDA-40")
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
EVIL = [
    *CAPTION,
    "</script><script>document.title = 'obeyed'</script>",
    "<!--",
    "<img src=x onerror=alert(1)>",
]


def write_run(folder, attack, n, right_draws, captions, images=IMAGES, dataset="toy"):
    """Rows of one attack on the first n images, LGAP right in right_draws(index) of two draws."""
    config = {"dataset": dataset, "target": {"name": "LGAP"}, "attack": attack.settings()}
    folder = folder / folder_name(attack.name)
    few = images[list(range(n))]
    adv = (few.x + 0.02 * (attack.eps_255 > 0)).clamp(0, 1)
    base = [{"index": i, "image": image, "label": label} for i, (image, label) in known_images(few).items()]
    changes = packed(adv, few.x)
    attacked = [{**row, "change": change, "linf": 0.02} for row, change in zip(base, changes)]
    Rows(folder, config).write(attacked)
    scored = []
    for row in base:
        for draw in range(2):
            wrong = draw >= right_draws(row["index"])
            label = (row["label"] + wrong) % len(NAMES)
            scored.append({**row, "draw": draw, "adversarial": label, "caption": captions(row)})
    Rows(folder / "lgap", config | {"n_draws": 2}, ("index", "draw")).write(scored)


def named(row):
    return f"a {NAMES[row['label']]}"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A run whose captions are of all kinds: natural on 24 images, one attack on 24, one on 12."""
    out = tmp_path_factory.mktemp("a run") / "toy"
    rows = out / "rows" / "table1_and_3"
    write_run(rows, NATURAL, 24, lambda i: 2, named)
    write_run(
        rows, MILD, 24, lambda i: 0 if i < 5 else 2, lambda row: (EVIL + [named(row)])[row["index"] % 24]
    )
    write_run(rows, HARD, 12, lambda i: 0 if i < 8 else 1, named)
    for part in ("tables", "figures"):
        shutil.copytree(ROOT / "outputs/published/toy" / part, out / part)
    shutil.copy(ROOT / "outputs/published/toy/results.json", out)
    picture = new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"})
    evil = new_output("execute_result", {"text/html": "<script>document.title='obeyed'</script>5"})
    cells = [
        new_markdown_cell(
            "[![Open](https://example.org/a.svg)](https://example.org)\n\n"
            "# 01 A title\n\n## Its part\n\n[next](02_b.ipynb)"
        ),
        new_code_cell("x", execution_count=1, outputs=[picture], metadata={"tags": ["shows-data"]}),
        new_code_cell("y", execution_count=2, outputs=[picture, evil]),
    ]
    marks = {"papermill": {"exception": None, "end_time": "now", "duration": 75.2}}
    (out / "notebooks").mkdir()
    nbformat.write(new_notebook(cells=cells, metadata=marks), out / "notebooks/01_first.ipynb")
    (out / "notebooks/02_torn.ipynb").write_text("{")
    report.build(out, "toy")
    return out


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


def test_it_says_what_was_run_and_what_to_doubt(out):
    text = (out / "index.html").read_text()
    for words in (
        "drawn by lgap_utils/toy.py",
        "75 s, the last run of each of 1 notebooks",
        "Table 3 (notebook 06)",
    ):
        assert words in text
    audit = json.loads((out / "results.json").read_text())["table 1"]
    assert f"seed={audit['provenance']['settings']['seed']}" not in text  # it is the profile's
    assert "PGD-40, step 2/255; eps 8/255; blind" in text and "02_torn" not in text


def test_no_text_of_a_model_is_markup(out):
    text = (out / "index.html").read_text()
    assert "<img src=x" not in text and text.count("<script") == 2 and "\\u003c/script" in text
    assert "script-src 'none'" in (out / "pages/01_first.html").read_text()


def test_an_executed_notebook_is_a_page_without_a_foreign_address(out):
    text = (out / "pages/01_first.html").read_text()
    assert "example.org" not in text and "01 A title" in text and text.count("image/png") == 2
    assert 'href="02_b.html"' in text


def test_a_setting_that_differs_is_named(out, tmp_path):
    other = shutil.copytree(out, tmp_path / "toy")
    results = json.loads((other / "results.json").read_text())
    results["table 1"]["provenance"]["settings"]["eps_255"] = 3
    (other / "results.json").write_text(json.dumps(results))
    assert "eps_255=3 (profile: 8)" in report.build(other, "toy").read_text()


def test_a_published_page_shows_drawn_scenes_but_no_picture_of_a_data_set(out, tmp_path):
    target = tmp_path / "published"
    for part in ("tables", "rows"):
        shutil.copytree(out / part, target / part)
    write_run(target / "rows/table2", NATURAL, 4, lambda i: 2, named, dataset="cifar10")
    nb = nbformat.read(out / "notebooks/01_first.ipynb", as_version=4)
    nb.cells[1].outputs[0].data["text/plain"] = f"{ROOT}/outputs"
    nb.metadata.papermill["output_path"] = str(out)
    source = tmp_path / "measured"
    (source / "notebooks").mkdir(parents=True)
    nbformat.write(nb, source / "notebooks/01_first.ipynb")
    text = report.publish(source, target, "toy").read_text()
    kept, page = (
        (target / "notebooks/01_first.ipynb").read_text(),
        (target / "pages/01_first.html").read_text(),
    )
    assert report.LEFT_OUT in text and report.LEFT_OUT in kept and report.LEFT_OUT in page
    assert page.count("image/png") == 1 and str(ROOT) not in kept and str(tmp_path) not in kept
    shown = [f"table1_and_3-{name}.png" for name in ("blind-pgd-40", "bpda-40", "clean")]
    assert sorted(file.name for file in target.glob("pages/*.png")) == shown


def test_a_stored_figure_has_fewer_colours_and_its_resolution():
    from PIL import Image

    file = io.BytesIO()
    Image.effect_noise((60, 40), 60).convert("RGB").save(file, "png", dpi=(150, 150))
    png = base64.b64encode(file.getvalue()).decode()
    with Image.open(io.BytesIO(base64.b64decode(notebooks.with_palette(png)))) as small:
        assert (small.mode, small.size, round(small.info["dpi"][0])) == ("P", (60, 40), 150)
    assert notebooks.with_palette(notebooks.with_palette(png)) == notebooks.with_palette(png)


def test_rows_of_other_images_have_no_picture_and_the_page_says_why(out, tmp_path):
    other, images = shutil.copytree(out, tmp_path / "toy"), data.load_images("toy", "test", 4)
    images.pixels[:] = 0
    write_run(other / "rows/table4", NATURAL, 4, lambda i: 2, named, images)
    text = report.build(other, "toy").read_text()
    assert "Table 4 has no pictures: the rows are of other images than those at hand." in text


def test_the_attacked_picture_is_that_of_the_rows(out):
    from PIL import Image

    sheets = [np.asarray(Image.open(out / f"pages/table1_and_3-{name}.png")) for name in ("clean", "bpda-40")]
    expected = (255 * (IMAGES.x[3] + 0.02).clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
    side = expected.shape[0]
    assert (sheets[0][:side, 3 * side : 4 * side] == IMAGES.pixels[3].permute(1, 2, 0).numpy()).all()
    assert (sheets[1][:side, 3 * side : 4 * side] == expected).all()


def test_a_torn_shard_or_a_foreign_folder_costs_its_own_rows_alone(out, tmp_path, capsys):
    other = shutil.copytree(out, tmp_path / "toy")
    (shard,) = (other / "rows/table1_and_3/bpda-40/lgap").glob("*.parquet")
    shard.write_bytes(shard.read_bytes()[:100])
    (other / "rows/mine/deeper").mkdir(parents=True)
    (other / "rows/mine/deeper/config.json").write_text("[")
    (entry,) = json_of(report.build(other, "toy"))
    assert [rung["name"] for rung in entry["rungs"]] == ["natural", "blind PGD-40"]


def json_of(page):
    text = page.read_text()
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


def test_attacks_are_ordered_by_what_they_leave_and_none_comes_first(out):
    (entry,) = json_of(out / "index.html")
    assert [(rung["name"], rung["n"]) for rung in entry["rungs"]] == [
        ("natural", 24),
        ("blind PGD-40", 24),
        ("BPDA-40", 12),
    ]
    assert entry["images"][3]["under"]["1"]["labels"] == [(IMAGES.labels[3].item() + 1) % len(NAMES)] * 2


def test_a_folder_without_a_run_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LGAP_OUTPUTS", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", "toy"])
    assert (
        stopped.value.code == 2 and "toy holds no run; ./run_all.sh toy makes one" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        cli.main(["report", "huge"])
    assert "huge" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", [390, 1440])
def test_in_a_browser_it_asks_nothing_of_a_network_and_fits(browser, out, width):
    page, complaints, asked = opened(browser, (out / "index.html").as_uri(), width)
    page.evaluate("document.getElementById('cards').scrollIntoView()")
    page.wait_for_selector(".card .picture")
    assert complaints == [] and all(address.startswith(("file:", "data:")) for address in asked)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.title() == "lgap: profile toy"  # no caption was obeyed
    page.goto((out / "pages/01_first.html").as_uri())  # in it a script would give another title
    assert page.title() == "01 A title" and page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.locator("h2").first.bounding_box()
    assert box and box["width"] > width / 2 and page.inner_text("h2") == "Its part"


def test_in_a_browser_filters_and_orders_do_what_they_say(browser, out):
    page, complaints, _ = opened(browser, (out / "index.html").as_uri())
    heads = lambda: [text.split(":")[0] for text in page.locator(".card h3").all_text_contents()]
    page.select_option("#rung", label="BPDA-40 (n = 12)")
    assert len(heads()) == 24 and "BPDA-40 was run on 12" in page.inner_text("#count")
    page.select_option("#show", label="caption right, LGAP wrong")
    assert heads() == [str(i) for i in range(8)]
    page.select_option("#show", label="right under every attack it met")
    assert heads() == [str(i) for i in range(12, 24)]
    page.select_option("#show", label="all images")
    page.select_option("#sort", label="what breaks it first")
    assert heads() == [str(i) for i in range(24)]  # 0 to 4 by PGD, 5 to 11 by BPDA
    page.select_option("#sort", label="what breaks it last")
    assert heads()[:2] == ["12", "13"] and heads()[-1] == "4"
    page.select_option("#label", label=NAMES[int(IMAGES.labels[0])])
    assert len(heads()) == int((IMAGES.labels == IMAGES.labels[0]).sum()) and complaints == []


def test_in_a_browser_captions_are_text_and_the_keyboard_is_enough(browser, out):
    page, complaints, _ = opened(browser, (out / "index.html").as_uri())
    shown = page.locator(".card").all_text_contents()
    assert (
        all(caption in text for caption, text in zip(EVIL[:23], shown))
        and page.locator(".card script").count() == 0
    )
    page.focus(".card button")
    page.keyboard.press("Enter")
    assert (
        page.inner_text("dialog strong").startswith("Image 0:")
        and page.locator("dialog tbody > tr").count() == 3
    )
    page.keyboard.press("ArrowRight")
    assert page.inner_text("dialog strong").startswith("Image 1:")
    page.keyboard.press("Escape")
    assert not page.evaluate("document.getElementById('detail').open") and complaints == []
    table = page.locator("#tables details", has_text="Table 1 (notebook 04)")
    table.locator("summary").press("Enter")
    table.locator(".tip").first.focus()
    assert page.evaluate("getComputedStyle(document.activeElement, '::after').content").startswith('"PGD')
