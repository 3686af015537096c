"""What a looped model does from loop to loop, measured: `rmse-probe`, and what its figures mean."""

KINDS = ("hops", "addition", "brackets")  # of problems; see problems.py
EPSILON = 0.1  # relative change below which a token counts as settled
