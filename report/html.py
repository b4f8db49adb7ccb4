"""A Markdown page -> one HTML file that needs nothing beside it."""
import base64
import re

from core.records import InputError, write_text

STYLE = """
body { font: 16px/1.5 Georgia, serif; color: #111;
       max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1, h2, h3, table { font-family: Helvetica, Arial, sans-serif }
h1, h2, h3 { line-height: 1.2 }
table { border-collapse: collapse; font-size: 0.8rem; margin: 1rem 0;
        border-top: 1.5px solid; border-bottom: 1.5px solid }
th, td { padding: 0.2rem 0.6rem; text-align: left; vertical-align: top }
th { border-bottom: 1px solid }
tr:nth-child(even) td { background: #f3f3f3 }
img { max-width: 100% }
@media print {
  body { font-size: 10pt; margin: 0; max-width: none }
  table, img { break-inside: avoid }
  h2, h3 { break-after: avoid }
}
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>{style}</style>
{body}
</html>
"""


def write_html(path):
    """Write the page of a Markdown file (a Path) beside it, with its PNG figures inside.
    Raises InputError where the package markdown is not installed."""
    try:
        import markdown
    except ImportError:
        raise InputError("report.html needs the package markdown (pip install -r "
                         "requirements.txt); the rest of the report is written") from None

    def inline(match):
        data = base64.b64encode((path.parent / match[2]).read_bytes()).decode()
        return f'{match[1]}"data:image/png;base64,{data}"'

    text = path.read_text(encoding="utf-8")
    title = text.partition("\n")[0].lstrip("# ")
    body = markdown.markdown(text, extensions=["tables"])
    body = re.sub(r'(<img [^<>]*src=)"([\w-]+\.png)"', inline, body)
    write_text(path.with_suffix(".html"), PAGE.format(title=title, style=STYLE, body=body))
