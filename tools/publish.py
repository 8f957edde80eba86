"""Puts what a run measured where readers find it: tables into the README, between `<!-- table: FILE -->` and `<!-- end -->`, so that
no number is typed by hand, and the rows of Tables 1 to 4 at `small` into outputs/small/rows_published. A run never looks there: it
finds no row but its own, and a clone measures anew.
"""
import pathlib
import re
import shutil

ROOT = pathlib.Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text):
    """The text with each marked part replaced by the file it names; a part whose file is not there stays."""
    def table(match):
        file = ROOT / match[2]
        return f"{match[1]}{file.read_text().strip()}\n{match[3]}" if file.exists() else match[0]
    return MARKED.sub(table, text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
    small = ROOT / "outputs" / "small"
    if measured := sorted((small / "rows").glob("table*")):
        shutil.rmtree(small / "rows_published", ignore_errors=True)
        for folder in measured:
            shutil.copytree(folder, small / "rows_published" / folder.name, ignore=shutil.ignore_patterns(".*"))
