"""Boards: Sudoku and mazes, made here, read, printed and checked. NumPy only: hosts of packages use it."""
