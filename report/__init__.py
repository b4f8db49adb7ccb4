"""What `evaluate.py report` does with a run folder: collect, compute, draw, write.

collect.py reads the files, and word_counts.py counts the words of texts. methods.py says which
methods there are. claims.py, prices.py, statistics.py and settings.py compute. figures.py,
curves.py and lengths.py draw. tables.py, examples.py, caveats.py and page.py write report.md;
html.py makes report.html of it. side*.py do the same for several runs side by side.
"""
