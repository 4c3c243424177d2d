"""``ep-comm bench overlap``: what operations cost the GEMMs that run beside them.

settings.py     what to measure, checked
gemms.py        what runs beside: dense GEMMs, a model's grouped one
price.py        the arithmetic: operations within the time of GEMMs, and the time these lost
measure.py      GEMMs on one stream, operations on another
check.py        results against plain torch
run.py          one run: every operation beside every GEMM, with every SM count
report.py       results as table, JSON and picture
"""
