"""README and docs: short, every link leads somewhere, every command is parsed, every number is a file's."""

import re
import shlex
import subprocess
import sys

import pytest

from lgap_utils.profiles import ROOT
from tools import badges, cli, cost, cost_table, runner, texts

PAGES = texts.pages()
# Numbers that are names, settings or versions, and are no result.
ALLOWED = re.compile(
    r"CIFAR-100?\b|Tables? \d( to \d)?|Figure \d|sections? [\d.]+|[48]/255|0 to 255|95 %|bfloat16|fp16|sha256"
    r"|Python 3\.11 to 3\.14|(?:BPDA|PGD|WRN|ResNet|AutoAttack)-\d+(?:-\d+)?|32 x 32|32 pixels|224 for"
    r"|Stable Diffusion v1\.5|\bL2\b|H100|CC0|2048 images|authors' 384|by 1024|at 1\b|0 and 100 %"
    r"|strength 0\.[15]|0\.5 is half|of 50 steps|t = \d+|Subramanyam, 2023|(?:\[n, 3, h, w\] )?in \[0, 1\]"
)


def page_name(page):
    return page.relative_to(ROOT).as_posix()


def prose(page):
    """A page without code, filled parts, addresses and its own marks."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = texts.PART.sub("", text)
    return re.sub(
        r"<!--.*?-->|`[^`\n]*`|\[[\w.-]+\]\([^)]*\)|\]\([^)]*\)|^\d\. ", "", text, flags=re.MULTILINE
    )


def anchors(page):
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 9 * 1024
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 330


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_link_and_anchor_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists() and there.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_number_is_of_a_file(page):
    assert not re.findall(r"[^\n]{0,30}\d[^\n]{0,20}", ALLOWED.sub("", prose(page)))


def test_a_number_that_was_typed_is_found(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("LGAP keeps 71.7 % under PGD-40.\n<!-- value: a | b | c -->64.2<!-- end --> and `9`\n")
    assert re.findall(r"\d[\d.]*", ALLOWED.sub("", prose(page))) == ["71.7"]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_the_page_shows_what_is_published(page):
    text = page.read_text(encoding="utf-8")
    assert texts.filled(text, ROOT, page.parent) == text
    assert text.count("<!-- end -->") == len(texts.PART.findall(text))
    assert not re.findall(r"^<!-- \w+:.*-->.", text, re.MULTILINE)  # Markdown would take it for HTML


def commands():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        spans = [s for s in re.findall(r"`([^`\n]+)`", texts.PART.sub("", text)) if " " in s]
        for line in "\n".join([*blocks, *spans]).splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                del words[0]
            program = "python" if words and words[0].endswith("/python") else words[0] if words else ""
            if program in ("python", "./run_all.sh") and words[2:] != ["lgap_utils"] and "..." not in words:
                yield pytest.param([program, *words[1:]], id=" ".join(words))


@pytest.mark.parametrize("words", commands())
def test_every_command_is_understood_by_its_own_parser(words, monkeypatch):
    """Up to where it would begin to work."""
    words = ["small" if word == "PROFILE" else word for word in words]
    if words[0] == "./run_all.sh":
        monkeypatch.setattr(runner, "ready", lambda *_: [])
        monkeypatch.setattr(runner, "run_all", lambda *_: [])
        monkeypatch.setattr(cost, "print_costs", lambda plan: None)
        if "--help" in words:
            with pytest.raises(SystemExit, match="0"):
                runner.main(words[1:])
        else:
            runner.main(words[1:])
    elif words[1:3] == ["-m", "lgap_utils"]:
        begun = []
        monkeypatch.setattr(cli.purify, "run", lambda parser, args: begun.append(args))
        monkeypatch.setattr(cli.doctor, "examine", lambda *args, **_: sys.exit("begun"))
        monkeypatch.setattr(cli, "show_tables", lambda parser, folder: begun.append(folder))
        goes_on = {"purify", "tables"} & set(words)
        with monkeypatch.context() if goes_on else pytest.raises(SystemExit) as end:
            cli.main(words[3:])
        assert begun or str(end.value) == "begun"
    elif words[1:3] == ["-m", "pip"]:
        assert words[3] == "install" and words[-1] in (ROOT / "pyproject.toml").read_text()
    elif words[1] == "-m":
        assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").exists()
    else:
        assert (ROOT / words[1]).exists()
        if words[1] == "checkpoints/make.py":
            done = subprocess.run(
                [sys.executable, *words[1:2], "--help"], cwd=ROOT, capture_output=True, text=True
            )
            assert done.returncode == 0 and words[2] in done.stdout


@pytest.mark.parametrize("page", ["README.md", "docs/own.md"])
def test_the_code_of_an_own_attack_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LGAP_OUTPUTS", str(tmp_path))
    blocks = re.findall("```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "protocols.Attack" in block)
    few = re.sub(r"n_steps=10, n_eot=4", "n_steps=1, n_eot=1", block).replace('"test", 8', '"test", 2')
    assert few.count("n_steps=1,") == 1 and few.count('"test", 2') == 1
    place = {}
    exec(few, place)
    assert 0 <= float(capsys.readouterr().out.splitlines()[-1]) <= 1
    assert (tmp_path / "toy/rows/mine").is_dir()
    if page == "docs/own.md":
        (block,) = (block for block in blocks if "named(my_purifier" in block)
        place["my_purifier"] = lambda x, captions, keys: x
        exec(block, place)
        assert place["defense"].purifier.settings() == {"name": "median filter", "width": 3}


def test_the_code_of_an_own_image_runs(tmp_path, monkeypatch, capsys):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), (200, 30, 30)).save("cat.png")
    page = (ROOT / "docs/own.md").read_text()
    (block,) = (b for b in re.findall("```python\n(.*?)```", page, re.DOTALL) if "purify_one" in b)
    exec(block, {})
    assert "Purified(" in capsys.readouterr().out and (tmp_path / "picture.png").stat().st_size > 10_000


# ---------------------------------------------------------------- the parts


def part(kind, root, base=None):
    return texts.filled(f"a <!-- {kind} -->\nold\n<!-- end --> b", root, base)


def test_a_part_is_filled_from_its_file_and_stays_without_it(tmp_path):
    (tmp_path / "t.csv").write_text('row,"x, %",y\na|b,1.5,2\n')
    (tmp_path / "docs").mkdir()
    assert "old" in part("table: none.md", tmp_path) and "old" in part("verdicts: small", tmp_path)
    assert "| row | y |\n|---|---|\n| a\\|b | 2 |" in part("table: t.csv | row | y", tmp_path)
    (tmp_path / "v.csv").write_text('row,"x, %"\na,1.5\n')
    assert texts.filled("<!-- value: v.csv | a | x, % -->?<!-- end --> %", tmp_path).endswith(
        "1.5<!-- end --> %"
    )
    assert "\n![text](../t.csv)\n" in part("figure: t.csv | text", tmp_path, tmp_path / "docs")
    for kind, why in (
        ("tables: t.csv", "expected one of"),
        ("table: t.csv | z", "no column 'z'"),
        ("value: v.csv | b | x, %", "no row 'b'"),
    ):
        with pytest.raises(ValueError, match=why):
            part(kind, tmp_path)


def test_filling_twice_changes_nothing_and_names_what_changed(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "t.md").write_text("| new |\n")
    (tmp_path / "README.md").write_text("<!-- table: t.md -->\nold\n<!-- end -->\n")
    (tmp_path / "docs/a.md").write_text("<!-- table: t.md -->\n<!-- end -->\n")
    assert texts.fill(tmp_path) == ["README.md", "docs/a.md"] and texts.fill(tmp_path) == []
    assert (tmp_path / "README.md").read_text() == "<!-- table: t.md -->\n| new |\n<!-- end -->\n"


# ---------------------------------------------------------------- the address and its badges


@pytest.mark.parametrize(
    "remote",
    [
        "https://github.com/some-one/l.gap.git",
        "https://token@github.com/some-one/l.gap",
        "git@github.com:some-one/l.gap.git",
        "ssh://git@github.com/some-one/l.gap/",
    ],
)
def test_the_address_of_a_remote(remote):
    assert badges.address(remote) == "https://github.com/some-one/l.gap"


@pytest.mark.parametrize(
    "remote", ["", "/a/folder", "https://gitlab.com/a/b", "https://github.com.evil.org/a/b"]
)
def test_another_host_is_refused(remote):
    with pytest.raises(ValueError, match="Colab opens no other"):
        badges.address(remote)


def test_a_badge_is_hidden_without_an_address_and_comes_back_with_one():
    path, there = ROOT / "notebooks/01_captioning.ipynb", "https://github.com/someone/lgap"
    hidden = badges.rewritten(path, badges.NONE)
    assert "Open In Colab" not in hidden and "<!-- badge -->" in hidden
    shown = badges.rewritten(path, there)
    assert shown.count("github/someone/lgap/blob/main/notebooks/01_captioning.ipynb") == 1
    assert "OWNER" not in shown and badges.with_badge("<!-- badge -->\n\n# A", "a", there).endswith("\n\n# A")


def test_the_costs_of_the_papers_tables_name_notebooks_that_are_there():
    table = (ROOT / "paper/cost.csv").read_text()
    for name, only in cost_table.RUNS.items():
        assert (
            f'{name},"./run_all.sh paper --only {only}"' in table
            or f"{name},./run_all.sh paper --only {only}" in table
        )
