"""What `evaluate.py report` does with a run folder: collect, compute, draw, write.

collect.py reads the files, methods.py says which methods there are, claims.py, prices.py and
statistics.py compute, figures.py draws, tables.py and page.py write report.md and report.html.
"""
