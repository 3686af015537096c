"""Looped models beside the dense model that one would deploy instead: `python -m benchmarks` (docs/benchmarks.md).

shapes.py           the looped models, and what llama.cpp runs beside each: a dense twin, or the model itself
artifacts.py        their files: packages, the GGUF of the twin or of HRM-Text
llama.py            llama.cpp's environment: made once, pinned
contestants/        what is timed, each in a process of its own, which protocol.py answers for
field.py            which contestants take part, and how each is started
child.py            the parent's end of such a process
rounds.py           the contestants in turns, round by round
cells.py            what a round gave: medians, spreads, ratios
first_token.py, bandwidth.py    time from a cold and a warm start; how fast this machine reads memory
report.py, plot.py  Markdown, JSON, a picture

Nothing is imported here: contestants of other environments come through this file.
"""
