"""Copies measured tables into the README, between `<!-- table: FILE -->` and `<!-- end -->`; no number is typed by hand."""
import pathlib
import re

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
